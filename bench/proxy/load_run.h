// The run of load.c: ramp, warm-up, slices of a second, end.

static void on_term(int signal_number) {
  (void)signal_number;
  stop = 1;
}

static int streams_open(const struct client *clients) {
  int n = 0;
  for (int i = 0; i < opt.clients; i++) n += clients[i].legs[DECODE].state == BODY && clients[i].legs[DECODE].tokens > 0;
  return n;
}

static void print_cpu(const char *name, struct cpu from, struct cpu to) {
  printf(",\"%s\":[%.3f,%.3f]", name, to.user - from.user, to.system - from.system);
}

static void print_slice(const struct reading *from, const struct reading *to, const struct client *clients) {
  printf("{\"seconds\":%.4f,\"requests\":%lu,\"tokens\":%lu,\"open\":%d,\"rss_kb\":%ld", (double)(to->at - from->at) / 1e9, slice.requests,
         slice.tokens, streams_open(clients), to->rss_kb);
  print_cpu("proxy", from->proxy, to->proxy);
  print_cpu("load", from->load, to->load);
  print_cpu("engine", from->engine, to->engine);
  printf(",\"busy\":[%.3f,%.3f],\"stolen\":[%.3f,%.3f]", to->busy[0] - from->busy[0], to->busy[1] - from->busy[1],
         to->stolen[0] - from->stolen[0], to->stolen[1] - from->stolen[1]);
  print_and_clear("ttft", &ttft);
  print_and_clear("delay", &delay);
  print_and_clear("latency", &latency);
  printf("}\n");
  fflush(stdout);
  memset(&slice, 0, sizeof slice);
}

static void print_end(bool stuck) {
  printf("{\"answered\":%lu,\"failed\":%lu,\"reconnects\":%lu,\"stuck\":%d,\"failures\":{", answered, failed, reconnects, stuck ? active : 0);
  const char *comma = "";
  for (int i = 0; i < KINDS; i++) {
    if (!failures[i]) continue;
    printf("%s\"%s\":%lu", comma, FAILURES[i], failures[i]);
    comma = ",";
  }
  printf("},\"example\":\"%s\"}\n", example);
}

static int run(void) {
  const uint64_t second = 1000000000u, patience = 20 * second;
  signal(SIGPIPE, SIG_IGN);
  signal(SIGTERM, on_term);
  poll_fd = epoll_create1(0);
  struct client *clients = calloc((size_t)opt.clients, sizeof *clients);
  if (!clients) fail("load: memory");
  for (int i = 0; i < opt.clients; i++)
    for (int kind = 0; kind < 2; kind++) clients[i].legs[kind] = (struct leg){.fd = -1, .kind = kind, .client = &clients[i]};
  uint64_t begun = now_ns(), measured_from = begun + (uint64_t)(opt.warmup * 1e9);
  end_at = begun + (uint64_t)((opt.warmup + opt.duration) * 1e9);
  int started = 0;
  bool over = false, stuck = false;
  struct reading last = {0};
  struct epoll_event events[MAX_EVENTS];
  while (started < opt.clients || active) {
    uint64_t now = now_ns();
    if (stop && now < end_at) end_at = now;
    for (; started < opt.clients && now >= begun + (uint64_t)(opt.ramp * 1e9 * started / opt.clients); started++) {
      active++;
      clients[started].active = true;
      ask(&clients[started]);
    }
    if (!measuring && !over && now >= measured_from) {
      measuring = true;
      last = take_reading(opt.pids, opt.engine, opt.cores);
    }
    if (measuring && now >= last.at + second) {
      struct reading next = take_reading(opt.pids, opt.engine, opt.cores);
      print_slice(&last, &next, clients);
      last = next;
    }
    if (now >= end_at) {
      measuring = false;
      over = true;
      if (opt.hold) break;
      if ((stuck = now > end_at + patience)) break;
    }
    int n = epoll_wait(poll_fd, events, MAX_EVENTS, started < opt.clients ? 1 : 20);
    for (int i = 0; i < n; i++) {
      struct leg *leg = events[i].data.ptr;
      if (leg->fd >= 0 && events[i].events & EPOLLOUT) send_rest(leg);
      if (leg->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(leg);
    }
  }
  print_end(stuck);
  return failed || stuck ? 3 : 0;
}
