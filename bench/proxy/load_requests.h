// What load.c sends and looks for, by API.
#include <stdio.h>

enum api { COMPLETIONS, CHAT, TOOLS, MESSAGES, APIS_KNOWN };

static const struct {
  const char *name, *target, *before, *after, *cached, *last;
} APIS[APIS_KNOWN] = {
#define OPENAI_USAGE "\"cached_tokens\":", "data: [DONE]"
#define TOOL(name, about)                                                                                                        \
  "{\"type\":\"function\",\"function\":{\"name\":\"" name "\",\"description\":\"" about "\",\"parameters\":{\"type\":\"object\"," \
  "\"properties\":{\"path\":{\"type\":\"string\",\"description\":\"A path inside the working tree\"},\"limit\":{\"type\":"        \
  "\"integer\"}},\"required\":[\"path\"]}}}"
    [COMPLETIONS] = {"completions", "/v1/completions", "\"prompt\":\"Hello, who are you?", "\"", OPENAI_USAGE},
    [CHAT] = {"chat", "/v1/chat/completions",
              "\"messages\":[{\"role\":\"system\",\"content\":\"You are helpful.\"},{\"role\":\"user\",\"content\":\"Hello, who are you?", "\"}]",
              OPENAI_USAGE},
    [TOOLS] = {"tools", "/v1/chat/completions", "\"messages\":[{\"role\":\"user\",\"content\":\"Hello, who are you?",
               "\"}],\"tools\":[" TOOL("read_file", "Read a file") "," TOOL("list_files", "List the files of a folder") "," TOOL(
                   "delete_file", "Delete a file") "],\"tool_choice\":\"auto\"",
               OPENAI_USAGE},
    [MESSAGES] = {"messages", "/v1/messages?beta=true",
                  "\"system\":\"You are helpful.\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Hello, who are you?",
                  "\"}]}]", "\"cache_read_input_tokens\":", "data: {\"type\":\"message_stop\"}"},
};

static enum api api_named(const char *name) {
  enum api api = COMPLETIONS;
  while (api < APIS_KNOWN && strcmp(APIS[api].name, name)) api++;
  return api;
}

// A prompt as long as makes the body of that many bytes; it may be longer than asked for by what the API needs.
static size_t make_body(char *body, enum api api, size_t size, long tokens, bool stream) {
  static const char WORDS[] = "The quick brown fox jumps over the lazy dog; then it said \\\"hello\\\" to the caf\xc3\xa9 and left.\\n";
  const size_t words = sizeof WORDS - 1, tail = 139 + strlen(APIS[api].after);
  const char *usage = api == MESSAGES ? "" : ",\"stream_options\":{\"include_usage\":true}";
  size_t n = (size_t)sprintf(body, "{\"model\":\"bench-model\",%s", APIS[api].before);
  while (n + words + tail < size) memcpy(body + n, WORDS, words), n += words;
  while (n + tail < size) body[n++] = 'x';
  return n + (size_t)sprintf(body + n, "%s,\"max_tokens\":%ld,\"temperature\":0,\"stream\":%s%s}", APIS[api].after, tokens,
                             stream ? "true" : "false", stream ? usage : "");
}

static size_t make_head(char *head, enum api api, int port, size_t length) {
  return (size_t)sprintf(head,
                         "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: bench\r\nAccept: */*\r\n%s"
                         "Authorization: Bearer none\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                         APIS[api].target, port, api == MESSAGES ? "anthropic-version: 2023-06-01\r\n" : "", length);
}
