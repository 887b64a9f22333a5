"""Elastic placement beside a fixed split and plain engines, on the same two GPUs.

    python -m bench.gpu_elastic --model DIR --out DIR                     # two GPUs, 7 minutes in all
    python -m bench.gpu_elastic --engines sim --out DIR --limit 90        # rehearsal of the flow without a GPU

Four engines start at once: two plain ones, and prefill and decode behind two proxies, one with PLACEMENT=split and one
with PLACEMENT=elastic. Both proxies use the same pair of engines, one after the other; engines without requests take no
compute. First TTFT of single requests on each way, then every rate on each arm, in three rounds, with the same arrival
times on all arms of a round; no prompt is in a prefix cache. On a machine with one GPU all engines share it: a
rehearsal, and marked so.

Each finding is a line of JSON in OUT/results.jsonl as it comes, every request is in OUT/raw.jsonl, and OUT/table.md is
rewritten after each round; ``--report`` makes it again. The run ends with its processes after ``--limit`` seconds.
Energy is that of all GPUs used, read as in bench/gpu_energy. Needs what the proxy needs, and vLLM for real engines.
"""
