// The reading side of load.c: HTTP answers with a length, in chunks, or until the connection ends.

static void take_lines(struct leg *leg, const char *bytes, size_t length) {
  while (length) {
    const char *end = opt.stream && leg->kind == DECODE ? memchr(bytes, '\n', length) : NULL;
    size_t n = end ? (size_t)(end - bytes) : length;
    if (end && !leg->line_length) {
      check_line(leg, bytes, n);
    } else if (leg->line_length + n > sizeof leg->line) {
      note(TOO_LONG, leg->line, leg->line_length);
      leg->line_length = 0;
    } else {
      memcpy(leg->line + leg->line_length, bytes, n);
      leg->line_length += n;
      if (end) {
        check_line(leg, leg->line, leg->line_length);
        leg->line_length = 0;
      }
    }
    if (!end) return;
    bytes = end + 1;
    length -= n + 1;
  }
}

// Returns whether the body is whole.
static bool take_body(struct leg *leg, const char *bytes, size_t length) {
  if (!leg->chunked) {
    if (leg->left >= 0 && (long long)length > leg->left) length = (size_t)leg->left;
    take_lines(leg, bytes, length);
    return leg->left >= 0 && !(leg->left -= (long long)length);
  }
  for (const char *end = bytes + length; bytes < end;) {
    if (leg->chunk == CHUNK_DATA) {
      size_t n = (size_t)(end - bytes) < leg->chunk_left ? (size_t)(end - bytes) : (size_t)leg->chunk_left;
      take_lines(leg, bytes, n);
      bytes += n;
      if (!(leg->chunk_left -= n)) leg->chunk = CHUNK_END;
      continue;
    }
    char c = *bytes++;
    if (c == '\n') {
      if (leg->chunk == LAST_CHUNK) return true;
      leg->chunk = leg->chunk == CHUNK_END ? CHUNK_SIZE : leg->chunk_left ? CHUNK_DATA : LAST_CHUNK;
    } else if (leg->chunk == CHUNK_SIZE && c != '\r') {
      leg->chunk_left = leg->chunk_left * 16 + (unsigned)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
  }
  return false;
}

// Returns how many of the bytes belong to the head, or 0 while it is not whole.
static size_t take_head(struct leg *leg, const char *bytes, size_t length) {
  size_t before = leg->head_length, room = sizeof leg->head - 1 - before, n = length < room ? length : room;
  memcpy(leg->head + before, bytes, n);
  leg->head_length += n;
  leg->head[leg->head_length] = 0;
  char *end = memmem(leg->head, leg->head_length, "\r\n\r\n", 4);
  if (!end) return 0;
  leg->head_length = (size_t)(end - leg->head) + 4;
  end[2] = 0;
  leg->status = atoi(leg->head + 9);
  for (char *line = strstr(leg->head, "\r\n"); line && line[2]; line = strstr(line + 2, "\r\n")) {
    if (!strncasecmp(line + 2, "content-length:", 15)) leg->left = atoll(line + 17);
    else if (!strncasecmp(line + 2, "transfer-encoding: chunked", 26)) leg->chunked = true;
    else if (!strncasecmp(line + 2, "connection: close", 17)) leg->closes = true;
  }
  if (opt.hidden && strstr(leg->head, "_addr_")) note(SHOWN_ID, leg->head, leg->head_length);
  leg->state = BODY;
  return leg->head_length - before;
}

static void ended(struct leg *leg) {
  if (leg->state == IDLE) return hang_up(leg);
  if (leg->state == BODY && !leg->chunked && leg->left < 0) {
    leg->closes = true;
    return finish(leg, true);
  }
  if (leg->state != BODY && leg->used) { // closed while the request was on its way: the next connection takes it
    reconnects++;
    hang_up(leg);
    return begin(leg);
  }
  note(CUT, leg->line, leg->line_length);
  finish(leg, false);
}

static void receive(struct leg *leg) {
  static char buffer[262144];
  for (;;) {
    ssize_t n = recv(leg->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) return ended(leg);
    const char *bytes = buffer;
    size_t length = (size_t)n;
    if (leg->state == IDLE) {
      note(COUNT, bytes, length < 100 ? length : 100); // bytes behind a whole answer
      return hang_up(leg);
    }
    if (leg->state != BODY) {
      size_t head = take_head(leg, bytes, length);
      bytes += head;
      length = leg->state == BODY ? length - head : 0;
      if (leg->state == BODY && !leg->chunked && !leg->left) return finish(leg, true);
    }
    if (length && take_body(leg, bytes, length)) return finish(leg, true);
    if ((size_t)n < sizeof buffer) return;
  }
}
