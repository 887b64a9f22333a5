// What the engine answers, by route: the bodies and events of vLLM's completions, chat and messages APIs.

#define TEXT " tok0000"
#define STAMP "\"t\":\"0000000000000000\"}\n\n"

enum form { COMPLETIONS, CHAT, TOOLS, MESSAGES, FORMS };

// printf formats. All but done take the id and the model first; then whole takes usage's cache figures, event its finish
// reason, and end the tokens with the prompt's and without. Those of the messages API need less of that: see make_end.
static const struct {
  const char *whole, *start, *event, *end, *done;
} SHAPES[FORMS] = {
#define HEAD(prefix, object) "{\"id\":\"" prefix "-%s\",\"object\":\"" object "\",\"created\":1760000000,\"model\":\"%s\",\"choices\":"
#define COUNTED "\"usage\":{\"prompt_tokens\":5,\"total_tokens\":6,\"completion_tokens\":1,\"prompt_tokens_details\":%s},\"kv_transfer_params\":null}"
#define LAST(prefix, object) "data: " HEAD(prefix, object) "[],\"usage\":{\"prompt_tokens\":5,\"total_tokens\":%ld,\"completion_tokens\":%ld,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n"
#define CHUNK(delta) "data: " HEAD("chatcmpl", "chat.completion.chunk") "[{\"index\":0,\"delta\":{" delta "},\"logprobs\":null,\"finish_reason\":%s}],\"usage\":null," STAMP
    [COMPLETIONS] =
        {HEAD("cmpl", "text_completion") "[{\"index\":0,\"text\":\"" TEXT "\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null,"
                                 "\"prompt_logprobs\":null}]," COUNTED,
         NULL,
         "data: " HEAD("cmpl", "text_completion") "[{\"index\":0,\"text\":\"" TEXT "\",\"logprobs\":null,\"finish_reason\":%s,\"stop_reason\":null}],"
                                          "\"usage\":null," STAMP,
         LAST("cmpl", "text_completion"), "data: [DONE]\n\n"},
    [CHAT] =
        {HEAD("chatcmpl", "chat.completion") "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"" TEXT "\",\"tool_calls\":[]},\"logprobs\":null,"
                                 "\"finish_reason\":\"length\",\"stop_reason\":null}]," COUNTED,
         "data: " HEAD("chatcmpl", "chat.completion.chunk") "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
                                                "\"finish_reason\":null}],\"usage\":null}\n\n",
         CHUNK("\"content\":\"" TEXT "\""), LAST("chatcmpl", "chat.completion.chunk"), "data: [DONE]\n\n"},
    [TOOLS] =
        {HEAD("chatcmpl", "chat.completion") "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"" TEXT "\",\"tool_calls\":[]},\"logprobs\":null,"
                                 "\"finish_reason\":\"length\",\"stop_reason\":null}]," COUNTED,
         "data: " HEAD("chatcmpl", "chat.completion.chunk") "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"chatcmpl-tool-1\",\"type\":"
                                                "\"function\",\"index\":0,\"function\":{\"name\":\"read_file\",\"arguments\":\"\"}}]},\"logprobs\":null,"
                                                "\"finish_reason\":null}],\"usage\":null}\n\n",
         CHUNK("\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"" TEXT "\"}}]"), LAST("chatcmpl", "chat.completion.chunk"), "data: [DONE]\n\n"},
    [MESSAGES] =
        {"{\"id\":\"chatcmpl-%s\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"" TEXT "\"}],\"model\":\"%s\","
         "\"stop_reason\":\"max_tokens\",\"stop_sequence\":null,\"usage\":{\"input_tokens\":5,\"output_tokens\":1%s}}",
         "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"chatcmpl-%s\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],"
         "\"model\":\"%s\",\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":1,\"output_tokens\":0,"
         "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":4}}}\n\n"
         "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
         "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"" TEXT "\"}," STAMP,
         "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
         "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"max_tokens\"},\"usage\":{\"input_tokens\":1,"
         "\"output_tokens\":%ld,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":4}}\n\n",
         "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"},
};

static const char *cache_figures(enum form form, bool any) {
  if (form == MESSAGES) return any ? ",\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":4" : "";
  return any ? "{\"cached_tokens\":4}" : "null";
}

static enum form form_of(const char *request, bool tools) {
  if (!strncmp(request, "POST /v1/messages", 17)) return MESSAGES;
  if (!strncmp(request, "POST /v1/chat", 13)) return tools ? TOOLS : CHAT;
  return COMPLETIONS;
}

static int make_end(char *to, size_t size, enum form form, const char *id, const char *model, long tokens) {
  if (form == MESSAGES) return snprintf(to, size, SHAPES[form].end, tokens);
  return snprintf(to, size, SHAPES[form].end, id, model, tokens + 5, tokens);
}
