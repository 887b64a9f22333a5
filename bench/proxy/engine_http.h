// The reading side of engine.c: connections and HTTP requests, whole or chunked, pipelined too.

static void parse(struct conn *c);

static void accept_all(struct conn *listener) {
  for (;;) {
    int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK), one = 1;
    if (fd < 0 && errno == EAGAIN) return;
    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      fail("engine: accept");
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct conn *c = grown(NULL, sizeof *c);
    *c = (struct conn){.fd = fd, .role = listener->role, .alive = true, .in_size = 4096};
    c->in = grown(NULL, c->in_size + 1);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e)) fail("engine: epoll");
  }
}

static void receive(struct conn *c) {
  for (;;) {
    if (c->in_size - c->in_length < 2048) {
      c->in_size *= 2;
      c->in = grown(c->in, c->in_size + 1);
    }
    size_t room = c->in_size - c->in_length;
    ssize_t n = recv(c->fd, c->in + c->in_length, room, 0);
    if (n < 0 && errno == EAGAIN) break;
    if (n <= 0) return drop(c);
    c->in_length += (size_t)n;
    c->in[c->in_length] = 0;
    if ((size_t)n < room) break;
  }
  parse(c);
}

// Joins the chunks of a body in place. Returns the bytes that it took in the buffer, 0 when it is not whole yet,
// -1 when it is no chunked body.
static ssize_t join_chunks(char *body, size_t length, size_t *joined) {
  char *from = body, *to = body, *end = body + length;
  if (length < 5 || !memmem(end - 5, 5, "0\r\n\r\n", 5)) return 0;
  while (from < end) {
    char *line_end;
    unsigned long size = strtoul(from, &line_end, 16);
    if (line_end == from || line_end[0] != '\r') return -1;
    from = line_end + 2;
    if (size + 2 > (size_t)(end - from)) return -1;
    memmove(to, from, size);
    to += size;
    from += size + 2;
    if (!size) {
      *joined = (size_t)(to - body);
      return from - body;
    }
  }
  return -1;
}

static void read_id(struct conn *c, const char *value) {
  size_t length = strcspn(value, "\r\n");
  if (length >= ID_LENGTH) length = ID_LENGTH - 1;
  memcpy(c->id, value, length);
  c->id[length] = 0;
}

// Takes whole requests off the buffer as long as none is being answered.
static void parse(struct conn *c) {
  while (c->alive && !c->streaming && c->in_length) {
    char *head_end = memmem(c->in, c->in_length, "\r\n\r\n", 4);
    if (!head_end) return;
    size_t head = (size_t)(head_end - c->in) + 4, length = 0;
    bool chunked = false, expects = false;
    strcpy(c->id, NO_ID);
    head_end[2] = 0;
    for (char *line = strstr(c->in, "\r\n"); line && line[2]; line = strstr(line + 2, "\r\n")) {
      const char *name = line + 2;
      if (!strncasecmp(name, "content-length:", 15)) length = strtoul(name + 15, NULL, 10);
      else if (!strncasecmp(name, "transfer-encoding: chunked", 26)) chunked = true;
      else if (!strncasecmp(name, "x-request-id: ", 14)) read_id(c, name + 14);
      else if (!strncasecmp(name, "expect:", 7)) expects = true;
    }
    head_end[2] = '\r';
    if (expects && c->in_length == head) put(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    char *body = c->in + head;
    size_t taken = length;
    if (chunked) {
      ssize_t n = join_chunks(body, c->in_length - head, &length);
      if (n < 0) {
        fprintf(stderr, "engine: a chunked body that cannot be read\n");
        return drop(c);
      }
      if (!n) return;
      taken = (size_t)n;
    } else if (c->in_length < head + length) {
      return;
    }
    bool post = !strncmp(c->in, "POST ", 5);
    if (post) generate(c, body, length);
    else control(c, c->in);
    if (!c->alive) return;
    c->in_length -= head + taken;
    memmove(c->in, c->in + head + taken, c->in_length);
    c->in[c->in_length] = 0;
  }
}
