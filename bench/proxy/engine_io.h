// The writing side of engine.c: what a socket does not take at once waits in the connection's buffer.

static void drop(struct conn *c) {
  if (!c->alive) return;
  c->alive = false;
  remove_stream(c);
  close(c->fd);
  c->next_dead = dead; // freed after the turn: events of this turn may still point here
  dead = c;
}

static void want_write(struct conn *c, bool wanted) {
  if (c->wants_write == wanted) return;
  c->wants_write = wanted;
  struct epoll_event e = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static void flush(struct conn *c) {
  while (c->alive && c->out_sent < c->out_length) {
    ssize_t n = send(c->fd, c->out + c->out_sent, c->out_length - c->out_sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) return want_write(c, true);
    if (n < 0 && errno != EINTR) return drop(c);
    if (n > 0) c->out_sent += (size_t)n;
  }
  if (!c->alive) return;
  c->out_sent = c->out_length = 0;
  want_write(c, false);
}

static void put(struct conn *c, const char *bytes, size_t length) {
  if (!c->alive) return;
  if (!c->out_length) {
    ssize_t n = send(c->fd, bytes, length, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return drop(c);
    if (n > 0) bytes += n, length -= (size_t)n;
    if (!length) return;
  }
  if (c->out_length + length > c->out_size) {
    c->out_size = (c->out_length + length) * 2;
    c->out = grown(c->out, c->out_size);
  }
  memcpy(c->out + c->out_length, bytes, length);
  c->out_length += length;
  want_write(c, true);
}
