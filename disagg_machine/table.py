"""The one table of settings of the machine. `help`, `config` and the tables in docs/settings.md are made from it.

Declared as those of the proxy are (disagg_proxy/config/table.py): name, reader, default, one sentence in English and
in Chinese. The field of :class:`disagg_machine.settings.Settings` is the name in lower case.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_machine import values
from disagg_machine.values import Reader, choice

WORKED_OUT = "@"
"""A default that depends on other settings; ``help`` says how."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        env: environment variable, and the name in the CONFIG file.
        read: text to value, ValueError with a remedy.
        default: the text that stands for the default; empty for none, :data:`WORKED_OUT` for one that depends.
        help, help_zh: one sentence, English and Chinese.
    """

    env: str
    read: Reader
    default: str
    help: str
    help_zh: str

    @property
    def name(self) -> str:
        """The field of :class:`disagg_machine.settings.Settings`."""
        return self.env.lower()

    @property
    def secret(self) -> bool:
        """Whether the value must be neither shown nor written to disk."""
        return self.read is values.secret

    def meaning(self, language: str) -> str:
        """The sentence in ``en`` or ``zh``."""
        return self.help_zh if language == "zh" else self.help


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("MODEL", values.text, "Qwen/Qwen3-4B",
            "model: a folder, or a Hugging Face name",
            "模型：目录或 Hugging Face 名称"),
    Setting("SERVED_MODEL_NAME", values.names, "",
            "names the model is served under, comma-separated; default: the last part of MODEL, and MODEL itself",
            "对外提供的模型名，逗号分隔；默认：MODEL 的最后一段以及 MODEL 本身"),
    Setting("ENGINE", choice("auto", "vllm", "sim"), "auto",
            "vllm, sim (simulated engines, no GPU needed), or auto: vllm when it is installed and two GPUs are there",
            "vllm、sim（模拟引擎，无需 GPU）或 auto：已安装 vLLM 且有两块 GPU 时用 vllm"),
    Setting("KV_CONNECTOR", choice("auto", "p2p_nccl", "own"), "auto",
            "how vllm moves KV: p2p_nccl (vLLM's P2pNcclConnector, 0.9.2 to 0.23), own (this project's disagg_kv, "
            "0.21 and newer), or auto: own from vLLM 0.24 on",
            "vllm 传输 KV 的方式：p2p_nccl（vLLM 的 P2pNcclConnector，0.9.2 至 0.23）、own（本项目的 disagg_kv，"
            "0.21 及更新版本）或 auto：vLLM 0.24 起用 own"),
    Setting("PREFILL_GPU", values.gpu, WORKED_OUT,
            "GPU of the prefill engine; default 0, or the first of CUDA_VISIBLE_DEVICES",
            "prefill 引擎的 GPU；默认 0，或 CUDA_VISIBLE_DEVICES 的第一个"),
    Setting("DECODE_GPU", values.gpu, WORKED_OUT,
            "GPU of the decode engine; default the next one after the prefill's",
            "decode 引擎的 GPU；默认为 prefill 之后的下一个"),
    Setting("PREFILL_GPUS", values.gpus, "",
            "several prefill engines: one entry each, 0,1; an entry 0+1 is one engine on two GPUs",
            "多个 prefill 引擎：每项一个，如 0,1；0+1 表示一个引擎占两块 GPU"),
    Setting("DECODE_GPUS", values.gpus, "",
            "several decode engines, written the same way",
            "多个 decode 引擎，写法相同"),
    Setting("TENSOR_PARALLEL", values.count, "1",
            "GPUs of each engine, counted up from its PREFILL_GPU or DECODE_GPU",
            "每个引擎的 GPU 数，从 PREFILL_GPU、DECODE_GPU 起往上数"),
    Setting("PREFILL_HTTP_PORT", values.port, "20003",
            "HTTP port of the first prefill engine; further ones are counted up",
            "第一个 prefill 引擎的 HTTP 端口，其余依次递增"),
    Setting("DECODE_HTTP_PORT", values.port, "20005",
            "HTTP port of the first decode engine; further ones are counted up",
            "第一个 decode 引擎的 HTTP 端口，其余依次递增"),
    Setting("PREFILL_KV_PORT", values.port, "21001",
            "KV port of the first prefill engine; every GPU of an engine takes one",
            "第一个 prefill 引擎的 KV 端口；引擎的每块 GPU 占一个"),
    Setting("DECODE_KV_PORT", values.port, "22001",
            "KV port of the first decode engine; every GPU of an engine takes one",
            "第一个 decode 引擎的 KV 端口；引擎的每块 GPU 占一个"),
    Setting("HTTP_PROXY_HOST", values.host, "0.0.0.0",
            "address the proxy's HTTP endpoint listens on",
            "代理 HTTP 服务监听的地址"),
    Setting("HTTP_PROXY_PORT", values.port, "10001",
            "port of the proxy's HTTP endpoint: where requests go",
            "代理 HTTP 服务端口：请求发到这里"),
    Setting("PROXY_HOST", values.host, "127.0.0.1",
            "address on which engines register with the proxy (ZMQ)",
            "引擎向代理注册（ZMQ）的监听地址"),
    Setting("PROXY_PORT", values.port, "30001",
            "port on which engines register with the proxy (ZMQ)",
            "引擎向代理注册（ZMQ）的端口"),
    Setting("ENGINE_HOST", values.host, "127.0.0.1",
            "address of the engines, also their VLLM_HOST_IP",
            "引擎的地址，同时作为 VLLM_HOST_IP"),
    Setting("GPU_MEMORY_UTILIZATION", values.fraction, "",
            "share of GPU memory for both roles, unless the role's own setting is given",
            "两种角色的显存占比，除非给出角色自己的设置"),
    Setting("PREFILL_GPU_MEMORY_UTILIZATION", values.fraction, WORKED_OUT,
            "share of GPU memory for prefill; default 0.9",
            "prefill 的显存占比；默认 0.9"),
    Setting("DECODE_GPU_MEMORY_UTILIZATION", values.fraction, WORKED_OUT,
            "share of GPU memory for decode; default 0.7 with p2p_nccl, whose KV buffer comes on top, 0.9 with own",
            "decode 的显存占比；p2p_nccl 默认 0.7（KV 缓冲另计），own 默认 0.9"),
    Setting("MAX_MODEL_LEN", values.count, "10000",
            "longest prompt plus answer, in tokens",
            "提示词加回答的最大 token 数"),
    Setting("MAX_NUM_BATCHED_TOKENS", values.count, WORKED_OUT,
            "tokens in one step of an engine; default MAX_MODEL_LEN, at least 8192",
            "引擎单步处理的 token 数；默认为 MAX_MODEL_LEN，至少 8192"),
    Setting("MAX_NUM_SEQS", values.count, "256",
            "requests in one step of an engine",
            "引擎单步处理的请求数"),
    Setting("CHUNKED_PREFILL", choice("auto", "on", "off"), "auto",
            "prefill in chunks; auto: with own yes, with p2p_nccl only when MAX_NUM_BATCHED_TOKENS is below "
            "MAX_MODEL_LEN, because there a chunk that ends inside a block can end the prefill engine",
            "分块 prefill；auto：own 启用；p2p_nccl 仅当 MAX_NUM_BATCHED_TOKENS 小于 MAX_MODEL_LEN 时启用，因为此时"
            "在块内结束的分块可能使 prefill 引擎退出"),
    Setting("ENFORCE_EAGER", choice("auto", "1", "0", "prefill"), "auto",
            "1: no CUDA graphs; prefill: decode with them; 0: both, with p2p_nccl prefill with piecewise ones; "
            "auto: 1 with p2p_nccl, 0 with own",
            "1：不用 CUDA graph；prefill：仅 decode 使用；0：都用，p2p_nccl 的 prefill 为分段式；auto：p2p_nccl 为 "
            "1，own 为 0"),
    Setting("DTYPE", values.word, "auto",
            "data type of the model",
            "模型的数据类型"),
    Setting("KV_BUFFER_SIZE", values.number, "8e9",
            "p2p_nccl: bytes of GPU memory on each decode GPU for KV that has arrived",
            "p2p_nccl：每块 decode GPU 上用于已到达 KV 的显存字节数"),
    Setting("MEM_POOL_SIZE_GB", values.count, "4",
            "p2p_nccl: GiB of pinned host memory for each decode GPU, used when the KV buffer is full; vLLM rounds "
            "up to a power of two",
            "p2p_nccl：每块 decode GPU 的锁页内存（GiB），KV 缓冲满时使用；vLLM 向上取 2 的幂"),
    Setting("EXTRA_PREFILL_ARGS", values.args, "",
            "more arguments for prefill engines; they come last and win",
            "prefill 引擎的附加参数，放在最后，优先生效"),
    Setting("EXTRA_DECODE_ARGS", values.args, "",
            "more arguments for decode engines",
            "decode 引擎的附加参数"),
    Setting("EXTRA_SIM_ARGS", values.args, "",
            "more arguments for simulated engines (see disagg-proxy sim --help); EXTRA_PREFILL_ARGS and "
            "EXTRA_DECODE_ARGS are for vllm only",
            "模拟引擎的附加参数（见 disagg-proxy sim --help）；EXTRA_PREFILL_ARGS 与 EXTRA_DECODE_ARGS 仅用于 vllm"),
    Setting("EXTRA_PROXY_ARGS", values.args, "",
            "more arguments for the proxy (see python disagg_prefill_proxy_server.py --help)",
            "代理的附加参数（见 python disagg_prefill_proxy_server.py --help）"),
    Setting("API_KEY", values.secret, "",
            "key that clients of the proxy must send",
            "代理的客户端须携带的密钥"),
    Setting("ENGINE_API_KEY", values.secret, "",
            "key that the engines ask the proxy for",
            "引擎要求代理携带的密钥"),
    Setting("DISAGG_KV_SECRET", values.secret, "",
            "own: secret that engines and proxy share",
            "own：各引擎与代理共享的密钥"),
    Setting("SUPERVISE", values.flag, "1",
            "restart processes that die or freeze after all; the same as all --supervise and --no-supervise",
            "all 之后重启退出或卡住的进程；等同于 all --supervise 与 --no-supervise"),
    Setting("RESTART_LIMIT", values.count, "5",
            "deaths and freezes of one process within RESTART_WINDOW after which it is given up",
            "单个进程在 RESTART_WINDOW 内退出或卡住多少次后放弃重启"),
    Setting("RESTART_WINDOW", values.count, "600",
            "seconds over which RESTART_LIMIT counts",
            "RESTART_LIMIT 的计数窗口（秒）"),
    Setting("RESTART_BACKOFF", values.number, "1",
            "seconds before a restart, doubled at each further one within the window, at most 60",
            "重启前等待的秒数，窗口内每次退出翻倍，最多 60"),
    Setting("START_TIMEOUT", values.count, WORKED_OUT,
            "seconds that all waits until everything is ready; default 120 simulated, 1800 with vllm (a download "
            "may be part of it)",
            "all 等待全部就绪的秒数；默认模拟引擎 120，vllm 1800（可能包含下载）"),
    Setting("STOP_TIMEOUT", values.count, "20",
            "seconds from TERM to KILL",
            "从 TERM 到 KILL 的秒数"),
    Setting("TEST_TIMEOUT", values.count, "60",
            "seconds without data after which a request of test has failed",
            "test 的请求静默多少秒后算失败"),
    Setting("BENCH_RATES", values.rates, "",
            "requests per second that bench tries, such as 1 2 4 8; default: doubled from 1 until the SLO breaks "
            "or the engines saturate, then in between",
            "bench 尝试的请求速率（每秒），如 1 2 4 8；默认从 1 起翻倍，直到 SLO 不满足或引擎饱和，再取中间值"),
    Setting("BENCH_SECONDS", values.count, WORKED_OUT,
            "seconds for which bench sends requests at each rate; default 30 with vllm, 10 simulated",
            "bench 在每个速率下发送请求的秒数；默认 vllm 30，模拟引擎 10"),
    Setting("BENCH_TIME_LIMIT", values.count, WORKED_OUT,
            "seconds after which bench begins no further rate with one setup, when it looks for rates itself; "
            "default 900 with vllm, 180 simulated",
            "自动寻找速率时，每种部署超过多少秒后不再尝试新的速率；默认 vllm 900，模拟引擎 180"),
    Setting("BENCH_SLO_TTFT_MS", values.number, "1000",
            "SLO of bench: longest time to the first token, in ms",
            "bench 的 SLO：首 token 时间上限（毫秒）"),
    Setting("BENCH_SLO_TPOT_MS", values.number, "50",
            "SLO of bench: longest mean time per output token after the first, in ms",
            "bench 的 SLO：首 token 之后每个 token 平均时间上限（毫秒）"),
    Setting("BENCH_SLO_ATTAINMENT", values.fraction, "0.9",
            "SLO of bench: share of the requests of a rate that must be in time",
            "bench 的 SLO：一个速率下须按时完成的请求比例"),
    Setting("BENCH_CLIENT", choice("auto", "vllm", "own"), "auto",
            "load generator of bench: vllm (vllm bench serve), own (this project's), or auto: vllm where the "
            "engines are vllm's",
            "bench 的负载生成器：vllm（vllm bench serve）、own（本项目的）或 auto：引擎为 vllm 时用 vllm"),
    Setting("BENCH_INPUT_LEN", values.count, "512",
            "prompt length of bench, in tokens",
            "bench 的提示词长度（token）"),
    Setting("BENCH_OUTPUT_LEN", values.count, "64",
            "answer length of bench, in tokens",
            "bench 的回答长度（token）"),
    Setting("BENCH_REQUESTS", values.count, WORKED_OUT,
            "requests of bench --once; default 200 with vllm, 60 simulated",
            "bench --once 的请求数；默认 vllm 200，模拟引擎 60"),
    Setting("BENCH_CONCURRENCY", values.count, "16",
            "requests of bench --once at once",
            "bench --once 的并发请求数"),
    Setting("BENCH_SIM_ENGINES", values.count, "4",
            "simulated engines that bench --ratio divides into prefill and decode",
            "bench --ratio 在 prefill 与 decode 之间分配的模拟引擎数"),
    Setting("BENCH_CLOCKS", values.count, "8",
            "clocks of each role that bench --clocks tries, evenly spaced over the supported ones",
            "bench --clocks 为每种角色尝试的时钟数，在支持的范围内均匀分布"),
    Setting("BENCH_ROUNDS", values.count, "3",
            "times that bench --clocks measures each clock, in an order of its own each time",
            "bench --clocks 测量每个时钟的次数，每轮顺序不同"),
    Setting("EXTRA_PLAIN_ARGS", values.args, "",
            "more arguments for the plain engines of bench --against-plain",
            "bench --against-plain 中普通引擎的附加参数"),
    Setting("POWER_BACKEND", choice("auto", "nvml", "zeusd", "sudo", "none"), "auto",
            "what sets clocks and power limits: nvml (as root), zeusd (its socket, ZEUSD_SOCK_PATH), sudo (sudo -n "
            "nvidia-smi), none, or auto: the first of them that may",
            "用什么设置时钟与功率上限：nvml（需 root）、zeusd（其套接字，ZEUSD_SOCK_PATH）、sudo（sudo -n "
            "nvidia-smi）、none 或 auto：第一个有权限的"),
    Setting("PREFILL_SM_CLOCK", values.clock, "",
            "highest SM clock of the prefill GPUs in MHz, such as 1410; lock:1410 also keeps idle GPUs there; default: "
            "the GPU's own; reset when what runs is stopped or dies",
            "prefill GPU 的最高 SM 时钟（MHz），如 1410；lock:1410 使空闲时也保持；默认由 GPU 决定；停止或异常退出后"
            "恢复"),
    Setting("DECODE_SM_CLOCK", values.clock, "",
            "the same for the decode GPUs",
            "decode GPU 的最高 SM 时钟，写法相同"),
    Setting("PREFILL_MEM_CLOCK", values.clock, "",
            "memory clock of the prefill GPUs, written the same way; it costs speed on most GPUs and is not touched "
            "unless it is set",
            "prefill GPU 的显存时钟，写法相同；多数 GPU 上会降低速度，未设置则不改动"),
    Setting("DECODE_MEM_CLOCK", values.clock, "",
            "the same for the decode GPUs",
            "decode GPU 的显存时钟，写法相同"),
    Setting("PREFILL_POWER_LIMIT", values.number, "",
            "power limit of each prefill GPU in watts",
            "每块 prefill GPU 的功率上限（瓦）"),
    Setting("DECODE_POWER_LIMIT", values.number, "",
            "power limit of each decode GPU in watts",
            "每块 decode GPU 的功率上限（瓦）"),
    Setting("POWER_GOVERNOR", choice("off", "slo"), "off",
            "slo: choose each role's SM clock by the TTFTs and gaps that the proxy sees, within BENCH_SLO_TTFT_MS and "
            "BENCH_SLO_TPOT_MS; PREFILL_SM_CLOCK and DECODE_SM_CLOCK, the best ones of bench --clocks, are the lowest",
            "slo：按代理观察到的 TTFT 与 token 间隔选择每种角色的 SM 时钟，满足 BENCH_SLO_TTFT_MS 与 "
            "BENCH_SLO_TPOT_MS；PREFILL_SM_CLOCK 与 DECODE_SM_CLOCK（bench --clocks 得出的最佳值）为下限"),
    Setting("POWER_TAKE_OVER", values.flag, "0",
            "1: set clocks also of GPUs on which somebody else seems to have set them; those are not restored",
            "1：即使 GPU 的时钟似乎已被他人设置也进行设置；他人的设置不会恢复"),
    Setting("REPORT_DIR", values.path, WORKED_OUT,
            "folder of the reports of bench; default: reports beside this script",
            "bench 报告目录；默认为脚本旁的 reports"),
    Setting("LOG_DIR", values.path, WORKED_OUT,
            "folder of the logs; default: logs beside this script, or RUN_DIR/logs when RUN_DIR is given",
            "日志目录；默认为脚本旁的 logs，给出 RUN_DIR 时为 RUN_DIR/logs"),
    Setting("RUN_DIR", values.path, WORKED_OUT,
            "folder of PID files, private to the user; default: run beside this script",
            "PID 文件目录，仅用户可访问；默认为脚本旁的 run"),
    Setting("PYTHON", values.text, WORKED_OUT,
            "Python to use or to make the virtual environment with; default python3",
            "使用的 Python，或用它创建虚拟环境；默认 python3"),
    Setting("VENV_DIR", values.path, WORKED_OUT,
            "virtual environment, made when PYTHON does not have what requirements-proxy.txt lists; default: .venv "
            "beside this script",
            "虚拟环境，当 PYTHON 缺少 requirements-proxy.txt 中的包时创建；默认为脚本旁的 .venv"),
    Setting("PROXY_COMPILED", choice("auto", "1", "0"), "auto",
            "the proxy's hot path as native code, in a checkout: auto builds it beside what runs, for the next start; "
            "1 builds it first, and the start fails where that fails; 0 never uses it",
            "检出目录中代理热路径的本地代码：auto 在运行的同时构建，供下次启动使用；1 先构建，失败则不启动；"
            "0 从不使用"),
    Setting("ALLOW_SHARED_GPU", values.choice("auto", "0", "1"), "auto",
            "whether a prefill and a decode engine may share a GPU, with a small KV cache each: auto, where there is "
            "only one; 1, also where PREFILL_GPU and DECODE_GPU say so; 0, never",
            "是否允许 prefill 与 decode 共用一块 GPU（各用较小的 KV 缓存）：auto 仅在只有一块 GPU 时；1 还包括 "
            "PREFILL_GPU 与 DECODE_GPU 指定同一块时；0 不允许"),
    Setting("CONFIG", values.path, "",
            "file with NAME=value lines; the environment wins over it",
            "含 NAME=value 的文件；环境变量优先"),
    Setting("CONFIG_FILE", values.path, "",
            "TOML file of the proxy's own settings, its --config; settings that the script passes on win over it",
            "代理自身的 TOML 配置文件，即其 --config；脚本传递的设置优先"),
)
# fmt: on

BY_ENV = {setting.env: setting for setting in SETTINGS}
