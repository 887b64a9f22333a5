// What the kernel says of processes and cores, in seconds since their start.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct cpu {
  double user, system;
};

struct reading {
  uint64_t at;
  struct cpu proxy, load, engine;
  double busy[2], stolen[2]; // of the proxy's core and of the load's
  long rss_kb;               // of the proxy
};

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int read_file(const char *path, char *text, size_t size) {
  int fd = open(path, O_RDONLY);
  if (fd < 0) return 0;
  ssize_t n = read(fd, text, size - 1);
  close(fd);
  text[n > 0 ? n : 0] = 0;
  return n > 0;
}

static void add_cpu(int pid, struct cpu *sum) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  char *fields = read_file(path, text, sizeof text) ? strrchr(text, ')') : NULL;
  unsigned long user, system;
  if (!fields || sscanf(fields + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2) return;
  double tick = 1.0 / (double)sysconf(_SC_CLK_TCK);
  sum->user += (double)user * tick;
  sum->system += (double)system * tick;
}

static long rss_kb(int pid) {
  char path[64], text[4096];
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  char *found = read_file(path, text, sizeof text) ? strstr(text, "VmRSS:") : NULL;
  return found ? atol(found + 6) : 0;
}

static void read_cores(const int cores[2], struct reading *r) {
  static char text[65536];
  double tick = 1.0 / (double)sysconf(_SC_CLK_TCK);
  if (!read_file("/proc/stat", text, sizeof text)) return;
  for (int i = 0; i < 2; i++) {
    char label[16];
    unsigned long user, nice, system, idle, wait, irq, soft, steal;
    snprintf(label, sizeof label, "\ncpu%d ", cores[i]);
    char *found = strstr(text, label);
    if (!found || sscanf(found + strlen(label), "%lu %lu %lu %lu %lu %lu %lu %lu", &user, &nice, &system, &idle, &wait, &irq, &soft,
                         &steal) != 8)
      continue;
    r->busy[i] = (double)(user + nice + system + irq + soft) * tick;
    r->stolen[i] = (double)steal * tick;
  }
}

static struct reading take_reading(const int *pids, int engine, const int cores[2]) {
  struct reading r = {.at = now_ns()};
  for (; *pids; pids++) {
    add_cpu(*pids, &r.proxy);
    r.rss_kb += rss_kb(*pids);
  }
  if (engine) add_cpu(engine, &r.engine);
  add_cpu(getpid(), &r.load);
  read_cores(cores, &r);
  return r;
}
