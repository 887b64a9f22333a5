"""Engines on a virtual clock behind the proxy's own registry, selection, admission queue and leases.

clock    an asyncio event loop whose time jumps to the next event
cache    a prefix cache of named blocks
engine   one vLLM engine: batch, KV cache, hand-over of KV; its steps last as the step model says
proxy    the proxy's own parts that place requests
requests who sends what when, as far as ``bench.policies`` and ``bench.elastic`` have it in common
"""
