// A prefill and a decode engine that cost next to nothing: one process, one thread, two listeners, no model.
//
//   engine            listens on 127.0.0.1, ports chosen by the kernel, and prints "PREFILL_PORT DECODE_PORT\n"
//
// HTTP/1.1 with keep-alive. What it answers has the form of vLLM's completions, chat or messages API (engine_forms.h):
//   POST any path     "stream": true: one SSE event per token, each in an HTTP chunk and a send() of its own, as uvicorn
//                     does it; with include_usage the usage event, which /v1/messages always has; then [DONE].
//                     Otherwise one JSON body of one token. "max_tokens" is the number of tokens; with "tools" they are the
//                     arguments of a call. The body's id ends in the X-Request-Id, as vLLM has it;
//                     without that header an id of the same length stands there, so that events never differ in size.
//                     Decode reports its whole prompt as cached, as it does behind a KV transfer; prefill reports none.
//   GET /set?K=V&..   gap_us: pause between two tokens of a stream (0: one token per stream and turn, as fast as possible)
//                     lockstep: 1 lets all streams emit at the same instant, as the steps of an engine do
//                     prefill_one: 1 makes prefill answer one token whatever it is asked for (a peer that asks for more)
//   GET /count        {"prefill": requests, "decode": requests}
//   GET /v1/models, /health and everything else: 200
//
// Every event carries "t": CLOCK_MONOTONIC in ns (16 hex digits) at its send(), and its number as text " tok0000".
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PREFILL, DECODE, MAX_EVENTS = 512, ID_LENGTH = 160, EVENT_LENGTH = 640 };

#include "engine_forms.h"

struct conn {
  int fd, role;
  bool listener, alive, wants_write;
  char *in, *out;
  size_t in_size, in_length, out_size, out_length, out_sent;
  bool streaming, stream, include_usage;
  long tokens, sent;
  uint64_t due;
  enum form form;
  char id[ID_LENGTH];
  char event[EVENT_LENGTH]; // the chunk of one token; number and time are patched in
  size_t event_length, number_at, time_at;
  struct conn *next, *previous; // in the list of streams, by due time when paced
  struct conn *next_dead;
};

static int poll_fd;
static uint64_t gap_ns;
static bool lockstep, prefill_one;
static struct conn *first_stream, *last_stream, *dead;
static unsigned long served[2];
static const char MODEL[] = "bench-model";
static const char NO_ID[] = "no-request-id-came-with-this-request-so-this-one-of-the-same-length-as-a-pair-s-stands-here-01";

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static void *grown(void *memory, size_t size) {
  memory = realloc(memory, size);
  if (!memory) fail("engine: memory");
  return memory;
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void append_stream(struct conn *c) {
  c->streaming = true;
  c->next = NULL;
  c->previous = last_stream;
  if (last_stream) last_stream->next = c;
  else first_stream = c;
  last_stream = c;
}

static void remove_stream(struct conn *c) {
  if (!c->streaming) return;
  if (c->previous) c->previous->next = c->next;
  else first_stream = c->next;
  if (c->next) c->next->previous = c->previous;
  else last_stream = c->previous;
  c->streaming = false;
}

#include "engine_io.h"

static void put_json(struct conn *c, const char *body) {
  char answer[4096];
  int n = snprintf(answer, sizeof answer,
                   "HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 07:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %zu\r\n"
                   "content-type: application/json\r\n\r\n%s",
                   strlen(body), body);
  put(c, answer, (size_t)n);
}

static size_t chunk(char *to, size_t size, const char *body) {
  return (size_t)snprintf(to, size, "%zx\r\n%s\r\n", strlen(body), body);
}

static void make_event(struct conn *c, const char *finish) {
  char body[EVENT_LENGTH - 16];
  snprintf(body, sizeof body, SHAPES[c->form].event, c->id, MODEL, finish);
  c->event_length = chunk(c->event, sizeof c->event, body);
  c->number_at = (size_t)(strstr(c->event, "\" tok0") - c->event) + 5;
  c->time_at = (size_t)(strstr(c->event, "\"t\":\"") - c->event) + 5;
}

static void end_stream(struct conn *c) {
  char body[768], framed[800];
  if (c->include_usage || c->form == MESSAGES) {
    make_end(body, sizeof body, c->form, c->id, MODEL, c->tokens);
    put(c, framed, chunk(framed, sizeof framed, body));
  }
  static const char END[] = "0\r\n\r\n";
  put(c, framed, chunk(framed, sizeof framed, SHAPES[c->form].done));
  put(c, END, sizeof END - 1);
  if (c->alive) remove_stream(c);
}

static void send_token(struct conn *c, uint64_t now) {
  if (c->sent + 1 == c->tokens) make_event(c, "\"length\"");
  static const char HEX[] = "0123456789abcdef";
  for (int i = 0; i < 16; i++) c->event[c->time_at + (size_t)i] = HEX[(now >> (60 - 4 * i)) & 15];
  for (long i = 3, left = c->sent; i >= 0; i--, left /= 10) c->event[c->number_at + (size_t)i] = (char)('0' + left % 10);
  put(c, c->event, c->event_length);
  if (c->alive && ++c->sent >= c->tokens) end_stream(c);
}

static void answer(struct conn *c) {
  if (c->stream) {
    static const char HEAD[] = "HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 07:00:00 GMT\r\nserver: uvicorn\r\n"
                               "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    put(c, HEAD, sizeof HEAD - 1);
    if (!c->alive) return;
    if (SHAPES[c->form].start) {
      char body[768], framed[800];
      snprintf(body, sizeof body, SHAPES[c->form].start, c->id, MODEL);
      put(c, framed, chunk(framed, sizeof framed, body));
    }
    make_event(c, "null");
    c->sent = 0;
    append_stream(c);
    uint64_t now = now_ns();
    c->due = lockstep && gap_ns ? (now / gap_ns + 1) * gap_ns : now + gap_ns;
    return send_token(c, now);
  }
  char body[1024];
  snprintf(body, sizeof body, SHAPES[c->form].whole, c->id, MODEL, cache_figures(c->form, c->role == DECODE));
  put_json(c, body);
}

// The number or truth value behind a key, or -1. Large bodies have their short fields at the ends.
static long field(const char *body, size_t length, const char *key) {
  enum { END = 512 };
  const char *found = memmem(body, length > 2 * END ? END : length, key, strlen(key));
  if (!found && length > 2 * END) found = memmem(body + length - END, END, key, strlen(key));
  if (!found && length > 2 * END) found = memmem(body, length, key, strlen(key));
  if (!found) return -1;
  for (found += strlen(key); *found == ' ' || *found == ':'; found++) {}
  return strncmp(found, "true", 4) ? strncmp(found, "false", 5) ? atol(found) : 0 : 1;
}

static void generate(struct conn *c, const char *body, size_t length) {
  served[c->role]++;
  c->form = form_of(c->in, field(body, length, "\"tools\"") >= 0);
  c->stream = field(body, length, "\"stream\"") == 1;
  c->include_usage = field(body, length, "\"include_usage\"") == 1;
  c->tokens = field(body, length, "\"max_tokens\"");
  if (c->tokens < 1 || (prefill_one && c->role == PREFILL)) c->tokens = 1;
  answer(c);
}

static unsigned long long query(const char *head, const char *name, unsigned long long otherwise) {
  const char *found = strstr(head, name);
  return found ? strtoull(found + strlen(name), NULL, 10) : otherwise;
}

static void control(struct conn *c, const char *head) {
  char body[512];
  if (!strncmp(head, "GET /count", 10)) {
    snprintf(body, sizeof body, "{\"prefill\":%lu,\"decode\":%lu}", served[PREFILL], served[DECODE]);
  } else if (!strncmp(head, "GET /set?", 9)) {
    gap_ns = query(head, "gap_us=", gap_ns / 1000) * 1000;
    lockstep = query(head, "lockstep=", lockstep);
    prefill_one = query(head, "prefill_one=", prefill_one);
    snprintf(body, sizeof body, "{}");
  } else if (!strncmp(head, "GET /v1/models", 14)) {
    snprintf(body, sizeof body,
             "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1,\"owned_by\":\"vllm\","
             "\"root\":\"%s\",\"max_model_len\":131072}]}",
             MODEL, MODEL);
  } else { // also sglang's /get_server_info and /get_model_info
    snprintf(body, sizeof body, "{\"model_path\":\"%s\",\"served_model_name\":\"%s\",\"tp_size\":1,\"dp_size\":1}", MODEL, MODEL);
  }
  put_json(c, body);
}

#include "engine_http.h"

static int listen_on_loopback(int *port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof at;
  if (fd < 0 || bind(fd, (void *)&at, sizeof at) || listen(fd, 4096) || getsockname(fd, (void *)&at, &size)) fail("engine: listen");
  *port = ntohs(at.sin_port);
  return fd;
}

// Streams whose time has come; those of a list without pace get one token each.
static void send_due(void) {
  struct conn *last = last_stream, *next;
  for (struct conn *c = first_stream; c; c = next) {
    bool ends_turn = c == last;
    next = c->next;
    uint64_t now = now_ns();
    if (gap_ns) {
      if (c->due > now) return;
      c->due = c->due + 2 * gap_ns < now ? now : c->due + gap_ns;
      remove_stream(c);
      append_stream(c);
      send_token(c, now);
    } else if (!c->out_length) { // else its reader is behind
      send_token(c, now);
    }
    if (c->alive && !c->streaming) parse(c);
    if (ends_turn) return;
  }
}

static void free_dead(void) {
  while (dead) {
    struct conn *c = dead;
    dead = c->next_dead;
    free(c->in);
    free(c->out);
    free(c);
  }
}

static int wait_for(struct epoll_event *events) {
  struct timespec pause = {0, 0}, *limit = NULL;
  if (first_stream) {
    uint64_t now = now_ns();
    if (gap_ns && first_stream->due > now) {
      uint64_t left = first_stream->due - now;
      pause = (struct timespec){(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
    }
    limit = &pause;
  }
  int n = epoll_pwait2(poll_fd, events, MAX_EVENTS, limit, NULL);
  if (n < 0 && errno != EINTR) fail("engine: epoll_pwait2 (Linux 5.11 or newer)");
  return n < 0 ? 0 : n;
}

int main(void) {
  signal(SIGPIPE, SIG_IGN);
  static struct conn listeners[2];
  int ports[2];
  poll_fd = epoll_create1(0);
  for (int role = 0; role < 2; role++) {
    listeners[role] = (struct conn){.fd = listen_on_loopback(&ports[role]), .role = role, .listener = true};
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listeners[role]};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, listeners[role].fd, &e)) fail("engine: epoll");
  }
  printf("%d %d\n", ports[PREFILL], ports[DECODE]);
  fflush(stdout);
  struct epoll_event events[MAX_EVENTS];
  for (;;) {
    int n = wait_for(events);
    for (int i = 0; i < n; i++) {
      struct conn *c = events[i].data.ptr;
      if (c->listener) accept_all(c);
      else if (c->alive && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
      if (!c->listener && c->alive && events[i].events & EPOLLOUT) flush(c);
    }
    send_due();
    free_dead();
  }
}
