// A load generator that costs little: closed loop, one thread, checks every answer, measures in slices of a second.
//
//   load --port N [--prefill-port N] [--clients N] [--tokens N] [--stream] [--body BYTES] [--ramp S] [--warmup S]
//        [--duration S] [--hold] [--hidden] [--cached N] [--api NAME] [--pids A,B] [--engine PID] [--cores PROXY,LOAD]
//
// Each client sends its next request when the last is answered; --ramp spreads their first ones. With --prefill-port
// there is no proxy: a client asks prefill for one token, then decode (--port), itself. --hold ends without waiting for
// open streams. SIGTERM ends the measuring early, orderly.
//
// --api is completions, chat, tools (chat with tools to call) or messages (with ?beta=true, as Anthropic's clients send).
//
// An answer is right when its status is 200, its tokens come in order and in number, a stream has its usage and its
// [DONE], with --hidden no byte of a line names the internal request id, and with --cached usage reports so many.
//
// Output: a JSON line for each second after --warmup, and a last one with what went wrong in all. Times are histograms
// (histogram.h): ttft, from the request's send to its first token; delay, from the engine's send of a token to its
// read here; latency, to the end of an answer. CPU and cores: procfs.h, --pids are the proxy's processes.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "histogram.h"
#include "procfs.h"

enum { PREFILL, DECODE, MAX_EVENTS = 512, MAX_PIDS = 256, MAX_FAILURES = 2000 };
enum state { IDLE, SENDING, HEAD, BODY };
enum chunk { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, LAST_CHUNK };
enum failure { CONNECT, CUT, STATUS, ORDER, COUNT, UNFINISHED, SHOWN_ID, WRONG_USAGE, TOO_LONG, KINDS };
static const char *const FAILURES[KINDS] = {"connect", "cut", "status", "order", "count", "unfinished", "shown id", "wrong usage", "too long"};

#include "load_requests.h"

struct client;

struct leg { // one connection of a client
  int fd, kind;
  struct client *client;
  bool wants_write, used;
  enum state state;
  size_t sent, head_length, line_length;
  int status, tokens;
  bool chunked, closes, done, usage;
  long long left; // of the body; -1: until the connection ends
  enum chunk chunk;
  unsigned long long chunk_left;
  char head[8192], line[4096];
};

struct client {
  struct leg legs[2];
  uint64_t asked;
  bool active;
};

static struct {
  int ports[2], clients, tokens, engine, pids[MAX_PIDS + 1], cores[2];
  bool direct, stream, hold, hidden;
  enum api api;
  long body, cached;
  double ramp, warmup, duration;
} opt = {.clients = 64, .tokens = 1, .body = 100, .cached = -1, .warmup = 1, .duration = 10, .cores = {0, 1}};

static int poll_fd, active;
static bool measuring;
static volatile sig_atomic_t stop;
static uint64_t end_at;
static char *requests[2];
static size_t request_lengths[2];
static struct { unsigned long requests, tokens; } slice;
static struct histogram ttft, delay, latency;
static unsigned long failures[KINDS], failed, answered, reconnects;
static char example[400];

static void fail(const char *what) {
  perror(what);
  exit(2);
}

static void note(enum failure kind, const char *text, size_t length) {
  failures[kind]++;
  if (example[0]) return;
  size_t at = (size_t)snprintf(example, sizeof example, "%s: ", FAILURES[kind]);
  for (size_t i = 0; i < length && at + 1 < sizeof example; i++) { // safe within a JSON string
    char c = text[i];
    example[at++] = c == '"' ? '\'' : c < ' ' || c == '\\' || c > '~' ? '.' : c;
  }
}

static bool dial(struct leg *leg) {
  int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.ports[leg->kind]), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (fd < 0) fail("load: socket");
  leg->used = leg->wants_write = false;
  leg->fd = fd;
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = leg};
  if (connect(fd, (void *)&at, sizeof at) || epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e)) {
    note(CONNECT, strerror(errno), strlen(strerror(errno)));
    close(fd);
    leg->fd = -1;
    return false;
  }
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  fcntl(fd, F_SETFL, O_NONBLOCK);
  return true;
}

static void hang_up(struct leg *leg) {
  if (leg->fd >= 0) close(leg->fd);
  leg->fd = -1;
}

static void send_rest(struct leg *leg) {
  bool waits = false;
  while (leg->sent < request_lengths[leg->kind] && !waits) {
    ssize_t n = send(leg->fd, requests[leg->kind] + leg->sent, request_lengths[leg->kind] - leg->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return; // the read that follows says what happened
    if (n < 0) waits = true;
    else leg->sent += (size_t)n;
  }
  if (!waits && leg->state == SENDING) leg->state = HEAD;
  if (waits == leg->wants_write) return;
  leg->wants_write = waits;
  struct epoll_event e = {.events = EPOLLIN | (waits ? EPOLLOUT : 0), .data.ptr = leg};
  epoll_ctl(poll_fd, EPOLL_CTL_MOD, leg->fd, &e);
}

static void rest(struct client *c) {
  if (c->active) active--;
  c->active = false;
}

static void begin(struct leg *leg) {
  if (leg->fd < 0 && !dial(leg)) {
    failed++;
    return rest(leg->client);
  }
  leg->state = SENDING;
  leg->sent = leg->head_length = leg->line_length = 0;
  leg->tokens = 0;
  leg->chunked = leg->closes = leg->done = leg->usage = false;
  leg->left = -1;
  leg->chunk = CHUNK_SIZE;
  leg->chunk_left = 0;
  send_rest(leg);
}

static void ask(struct client *c) {
  if (stop || failed > MAX_FAILURES || now_ns() >= end_at) return rest(c);
  c->asked = now_ns();
  begin(&c->legs[opt.direct ? PREFILL : DECODE]);
}

// One line of a stream's body, or the whole body of another answer.
static void check_line(struct leg *leg, const char *line, size_t length) {
  if (length && line[length - 1] == '\r') length--;
  if (!length || (opt.direct && leg->kind == PREFILL)) return;
  uint64_t now = now_ns();
  if (opt.hidden && memmem(line, length, "_addr_", 6)) note(SHOWN_ID, line, length);
  const char *last = APIS[opt.api].last;
  if (opt.stream && length == strlen(last) && !memcmp(line, last, length)) {
    leg->done = true;
    return;
  }
  const char *token = memmem(line, length, "\" tok", 5);
  const char *key = APIS[opt.api].cached, *cached = memmem(line, length, key, strlen(key));
  if (memmem(line, length, "\"usage\":{", 9)) {
    leg->usage = true;
    if (opt.cached >= 0 && (!cached || atol(cached + strlen(key)) != opt.cached)) note(WRONG_USAGE, line, length);
  }
  if (!token) return;
  if (atoi(token + 5) != leg->tokens) note(ORDER, line, length);
  const char *stamp = memmem(line, length, "\"t\":\"", 5);
  if (measuring && stamp) add_ns(&delay, now - strtoull(stamp + 5, NULL, 16));
  if (measuring && !leg->tokens) add_ns(&ttft, now - leg->client->asked);
  leg->tokens++;
  if (measuring) slice.tokens++;
}

static bool is_right(struct leg *leg) {
  unsigned long before = 0, after = 0;
  for (int i = 0; i < KINDS; i++) before += failures[i];
  if (leg->status != 200) note(STATUS, leg->head, leg->head_length);
  else if (!opt.direct || leg->kind == DECODE) {
    if (!opt.stream) check_line(leg, leg->line, leg->line_length);
    if (leg->tokens != (opt.stream ? opt.tokens : 1)) note(COUNT, leg->line, leg->line_length);
    else if (!leg->usage || (opt.stream && !leg->done)) note(UNFINISHED, leg->line, leg->line_length);
  }
  for (int i = 0; i < KINDS; i++) after += failures[i];
  return before == after;
}

static void finish(struct leg *leg, bool whole) {
  struct client *c = leg->client;
  bool right = whole && is_right(leg);
  if (leg->closes || !right) hang_up(leg);
  leg->used = true;
  leg->state = IDLE;
  if (right && opt.direct && leg->kind == PREFILL) return begin(&c->legs[DECODE]);
  if (!right) failed++;
  else {
    answered++;
    if (measuring) {
      slice.requests++;
      add_ns(&latency, now_ns() - c->asked);
    }
  }
  ask(c);
}

#include "load_http.h"

static void prepare(int kind, long tokens, bool stream) {
  char *body = malloc((size_t)opt.body + 4096), *request = malloc((size_t)opt.body + 5120);
  if (!body || !request) fail("load: memory");
  size_t n = make_body(body, opt.api, (size_t)opt.body, tokens, stream);
  size_t head = make_head(request, opt.api, opt.ports[kind], n);
  memcpy(request + head, body, n);
  free(body);
  requests[kind] = request;
  request_lengths[kind] = head + n;
}

static void read_options(int count, char **arguments) {
  static const struct option NAMES[] = {
      {"port", 1, 0, 'p'}, {"prefill-port", 1, 0, 'P'}, {"clients", 1, 0, 'c'}, {"tokens", 1, 0, 't'}, {"stream", 0, 0, 's'},
      {"body", 1, 0, 'b'}, {"ramp", 1, 0, 'r'}, {"warmup", 1, 0, 'w'}, {"duration", 1, 0, 'd'}, {"hold", 0, 0, 'H'},
      {"hidden", 0, 0, 'h'}, {"cached", 1, 0, 'C'}, {"pids", 1, 0, 'i'}, {"engine", 1, 0, 'e'}, {"cores", 1, 0, 'o'}, {"api", 1, 0, 'a'}, {0, 0, 0, 0}};
  int pids = 0;
  for (int o; (o = getopt_long(count, arguments, "", NAMES, NULL)) != -1;) switch (o) {
      case 'p': opt.ports[DECODE] = atoi(optarg); break;
      case 'P': opt.ports[PREFILL] = atoi(optarg), opt.direct = true; break;
      case 'c': opt.clients = atoi(optarg); break;
      case 't': opt.tokens = atoi(optarg); break;
      case 's': opt.stream = true; break;
      case 'b': opt.body = atol(optarg); break;
      case 'r': opt.ramp = atof(optarg); break;
      case 'w': opt.warmup = atof(optarg); break;
      case 'd': opt.duration = atof(optarg); break;
      case 'H': opt.hold = true; break;
      case 'h': opt.hidden = true; break;
      case 'C': opt.cached = atol(optarg); break;
      case 'a':
        if ((opt.api = api_named(optarg)) < APIS_KNOWN) break;
        fprintf(stderr, "load: no such --api\n");
        exit(2);
      case 'e': opt.engine = atoi(optarg); break;
      case 'i':
        for (char *p = strtok(optarg, ","); p && pids < MAX_PIDS; p = strtok(NULL, ",")) opt.pids[pids++] = atoi(p);
        break;
      case 'o':
        if (sscanf(optarg, "%d,%d", &opt.cores[0], &opt.cores[1]) == 2) break;
        __attribute__((fallthrough));
      default: exit(2);
    }
  if (!opt.ports[DECODE] || opt.clients < 1 || opt.tokens < 1) {
    fprintf(stderr, "load: --port is needed; --clients and --tokens are at least 1\n");
    exit(2);
  }
}

#include "load_run.h"

int main(int count, char **arguments) {
  read_options(count, arguments);
  prepare(DECODE, opt.tokens, opt.stream);
  prepare(PREFILL, 1, false);
  return run();
}
