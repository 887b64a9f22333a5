"""The table of settings, from which flags, ``--help`` and docs/settings.md are generated."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_proxy.config import values
from disagg_proxy.config.values import Reader


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: the field of :class:`disagg_proxy.config.model.Config`.
        env: environment variable.
        flag: command-line flag; the values of a ``repeated`` one are combined.
        default: the default as text; empty for none.
        read: converts text to a value; raises ValueError that says what the value must be.
        help, help_zh: one sentence, English and Chinese.
        repeated: whether the flag may be given several times.
        secret: whether the value must not be shown.
        reload: whether a changed value takes effect on SIGHUP; others need a restart.
    """

    name: str
    env: str
    flag: str
    default: str
    read: Reader
    help: str
    help_zh: str
    repeated: bool = False
    secret: bool = False
    reload: bool = False


_ANY_POLICY = ("least_loaded", "power_of_two", "round_robin", "session")

# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("config_file", "CONFIG_FILE", "--config", "", values.path,
            "TOML file of settings, under the names of their environment variables; read again on SIGHUP",
            "TOML 格式的配置文件，键名与环境变量相同；收到 SIGHUP 时重新读取"),
    Setting("http_host", "HTTP_PROXY_HOST", "--http-host", "0.0.0.0", values.host,
            "address the HTTP endpoint listens on",
            "HTTP 服务监听的地址"),
    Setting("http_port", "HTTP_PROXY_PORT", "--http-port", "10001", values.port,
            "port of the HTTP endpoint; 0 lets the kernel choose",
            "HTTP 服务端口；0 表示由内核选择"),
    Setting("workers", "WORKERS", "--workers", "1", values.workers,
            "processes that serve requests, all on the same port; auto: one for each available core",
            "处理请求的进程数，共用同一端口；auto 表示每个可用核心一个"),
    Setting("zmq_host", "PROXY_HOST", "--zmq-host", "0.0.0.0", values.host,
            "address on which instances register (ZMQ)",
            "实例注册（ZMQ）监听的地址"),
    Setting("zmq_port", "PROXY_PORT", "--zmq-port", "30001", values.port,
            "port on which instances register (ZMQ)",
            "实例注册（ZMQ）端口"),
    Setting("prefill", "PREFILL_INSTANCES", "--prefill", "", values.instances,
            "a prefill instance that does not ping: URL[,KV_ADDRESS] or URL,nixl; repeat the flag, or use spaces",
            "不发送心跳的 prefill 实例：URL[,KV_ADDRESS] 或 URL,nixl；可重复该参数，或用空格分隔", repeated=True),
    Setting("decode", "DECODE_INSTANCES", "--decode", "", values.instances,
            "a decode instance that does not ping: URL[,KV_ADDRESS] or URL,nixl; repeat the flag, or use spaces",
            "不发送心跳的 decode 实例：URL[,KV_ADDRESS] 或 URL,nixl；可重复该参数，或用空格分隔", repeated=True),
    Setting("allow_register", "ALLOW_REGISTER", "--allow-register", "local", values.registrants,
            "who may register, comma-separated: local (this machine's addresses), any, addresses, networks, host "
            "names, proven (who proves DISAGG_KV_SECRET)",
            "允许注册的来源，逗号分隔：local（本机地址）、any、地址、网段、主机名、"
            "proven（能证明 DISAGG_KV_SECRET 者）",
            reload=True),
    Setting("instance_expiry", "INSTANCE_EXPIRY", "--instance-expiry", "10", values.seconds,
            "seconds without a ping (sent every 3 s) after which an instance is lost",
            "超过多少秒没有心跳（每 3 秒一次）即视实例为丢失", reload=True),
    Setting("forward_registrations", "FORWARD_REGISTRATIONS", "--forward-registrations", "", values.addresses,
            "registration ports of other proxies over the same instances, HOST:PORT separated by commas: what "
            "instances announce here is passed on to them",
            "使用同一批实例的其他代理的注册端口，HOST:PORT，逗号分隔：本代理收到的注册会转发给它们"),
    Setting("power_meter", "POWER_METER", "--power-meter", "1", values.flag,
            "use what engines and POWER_GPUS say of the energy of their GPUs; 0: no energy figures",
            "使用实例与 POWER_GPUS 提供的 GPU 能耗数据；0 表示不提供能耗数据"),
    Setting("power_gpus", "POWER_GPUS", "--power-gpus", "", values.engine_gpus,
            "GPUs of engines on this machine that do not report their energy themselves: HOST:PORT=GPU, several GPUs "
            "joined by +, engines separated by commas; indices as in nvidia-smi, or UUIDs",
            "本机上不自行上报能耗的实例所用的 GPU：HOST:PORT=GPU，多个 GPU 用 + 连接，多个实例用逗号分隔；"
            "编号同 nvidia-smi，或用 UUID"),
    Setting("probe_interval", "PROBE_INTERVAL", "--probe-interval", "5", values.seconds,
            "seconds between two probes of an instance's /health and /v1/models",
            "检查实例 /health 与 /v1/models 的间隔秒数", reload=True),
    Setting("connect_timeout", "CONNECT_TIMEOUT", "--connect-timeout", "5", values.seconds,
            "seconds for a connection to an instance",
            "连接实例的超时秒数", reload=True),
    Setting("prefill_timeout", "PREFILL_TIMEOUT", "--prefill-timeout", "600", values.seconds,
            "seconds for the prefill of a request, then 504",
            "一次 prefill 的超时秒数，超时返回 504", reload=True),
    Setting("decode_timeout", "DECODE_TIMEOUT", "--decode-timeout", "600", values.seconds,
            "longest idle time of decode in seconds: 504 before the answer begins, a cut connection afterwards",
            "decode 最长无输出秒数：回答开始前返回 504，开始后切断连接", reload=True),
    Setting("freeze_after_min", "FREEZE_AFTER_MIN", "--freeze-after-min", "20", values.seconds,
            "shortest stall deadline in seconds; the deadline of an instance is learnt from its recent response times",
            "判定实例停滞的最短时限（秒）；每个实例的时限由其近期响应时间得出", reload=True),
    Setting("freeze_after_max", "FREEZE_AFTER_MAX", "--freeze-after-max", "300", values.seconds,
            "longest stall deadline in seconds; also used while too few response times are known",
            "判定实例停滞的最长时限（秒）；响应时间样本不足时也使用此值", reload=True),
    Setting("body_timeout", "BODY_TIMEOUT", "--body-timeout", "60", values.seconds,
            "seconds that a client may take to send its body, then 408",
            "客户端发送请求体的超时秒数，超时返回 408", reload=True),
    Setting("header_timeout", "HEADER_TIMEOUT", "--header-timeout", "20", values.seconds,
            "seconds that a client may take to send its request's headers, then 408; also for idle new connections",
            "客户端发送请求头的超时秒数，超时返回 408；也用于没有请求的新连接", reload=True),
    Setting("send_timeout", "SEND_TIMEOUT", "--send-timeout", "300", values.seconds,
            "seconds within which a client must read some of its pending answer, or its connection is cut "
            "(after at most twice as long)",
            "有待读取的回答时，客户端在多少秒内须读取一部分，否则断开（最迟两倍时间）", reload=True),
    Setting("shutdown_grace", "SHUTDOWN_GRACE", "--shutdown-grace", "30", values.seconds,
            "total seconds from SIGTERM to the exit; the last fifth (at most 5 s) is for KV release, the rest for "
            "accepted requests",
            "从收到 SIGTERM 到退出的总秒数；最后五分之一（最多 5 秒）用于释放 KV，其余留给已接受的请求", reload=True),
    Setting("max_body_bytes", "MAX_BODY_BYTES", "--max-body-bytes", "64M", values.size,
            "largest request body, then 413; the default holds a prompt of 1M tokens",
            "请求体上限，超出返回 413；默认值足够 100 万 token 的提示词", reload=True),
    Setting("max_header_bytes", "MAX_HEADER_BYTES", "--max-header-bytes", "64K", values.size,
            "largest request line with headers, then 431",
            "请求行与请求头的总大小上限，超出返回 431", reload=True),
    Setting("max_tries", "MAX_TRIES", "--max-tries", "3", values.count,
            "pairs tried for one request while its instances fail before they have accepted it",
            "实例在接受请求前失败时，单个请求最多尝试的实例对数", reload=True),
    Setting("max_in_flight", "MAX_IN_FLIGHT", "--max-in-flight", "0", values.limit,
            "requests on the instances at once, in all; more wait in a queue; 0: no limit",
            "所有实例上同时处理的请求总数，超出的排队；0 表示不限", reload=True),
    Setting("prefill_max_in_flight", "PREFILL_MAX_IN_FLIGHT", "--prefill-max-in-flight", "0", values.limit,
            "requests on one prefill at once; 0: no limit",
            "单个 prefill 同时处理的请求数；0 表示不限", reload=True),
    Setting("decode_max_in_flight", "DECODE_MAX_IN_FLIGHT", "--decode-max-in-flight", "256", values.limit,
            "requests on one decode at once, from their prefill on; vLLM's --max-num-seqs, so that KV is loaded as it "
            "comes; 0: no limit",
            "单个 decode 同时处理的请求数（从 prefill 开始计）；取 vLLM 的 --max-num-seqs，使 KV 到达即加载；"
            "0 表示不限", reload=True),
    Setting("kv_buffer_bytes", "KV_BUFFER_BYTES", "--kv-buffer-bytes", "0", values.size_or_none,
            "bytes of KV that may wait on one decode of P2pNcclConnector, its kv_buffer_size; further prompts queue; "
            "0, or no KV_BYTES_PER_TOKEN: as many prompt tokens as its max_model_len",
            "使用 P2pNcclConnector 时单个 decode 上可等待的 KV 字节数（即其 kv_buffer_size），超出的请求排队；"
            "0 或未设 KV_BYTES_PER_TOKEN 时：提示词 token 数不超过其 max_model_len", reload=True),
    Setting("kv_bytes_per_token", "KV_BYTES_PER_TOKEN", "--kv-bytes-per-token", "0", values.size_or_none,
            "bytes of KV of one prompt token, 2 x layers x KV heads x head size x bytes of the data type; needed for "
            "KV_BUFFER_BYTES; 0: unknown",
            "每个提示词 token 的 KV 字节数：2 x 层数 x KV 头数 x 头维度 x 数据类型字节数；"
            "KV_BUFFER_BYTES 需要它；0 表示未知", reload=True),
    Setting("decode_alone", "DECODE_ALONE", "--decode-alone", "1", values.flag,
            "1 lets a decode with the disagg_kv connector serve requests alone while there is no prefill",
            "设为 1 时，若没有 prefill，使用本项目连接器的 decode 可独自处理请求", reload=True),
    Setting("decode_alone_below", "DECODE_ALONE_BELOW", "--decode-alone-below", "0", values.limit,
            "prompts of fewer tokens (estimated) go to a decode with the disagg_kv connector alone; 0: none",
            "估计 token 数低于此值的提示词只交给使用本项目连接器的 decode；0 表示不启用", reload=True),
    Setting("placement", "PLACEMENT", "--placement", "split", values.choice("split", "elastic"),
            "where a request is prefilled, with the disagg_kv connector: split, always on a prefill; elastic, decided "
            "for each request: on a prefill, or on the engine of either role that then decodes it",
            "使用本项目连接器时请求在何处 prefill：split 总是在 prefill 上；elastic 对每个请求单独决定："
            "在 prefill 上，或在随后生成回答的任一角色的实例上", reload=True),
    Setting("slo_ttft_ms", "SLO_TTFT_MS", "--slo-ttft-ms", "0", values.milliseconds,
            "with PLACEMENT=elastic or ROLES=auto: longest time to first token in milliseconds that a request is to "
            "have; 0: none",
            "PLACEMENT=elastic 或 ROLES=auto 时的首 token 时间目标（毫秒）；0 表示没有", reload=True),
    Setting("slo_tpot_ms", "SLO_TPOT_MS", "--slo-tpot-ms", "0", values.milliseconds,
            "with PLACEMENT=elastic or ROLES=auto: longest mean time between two output tokens in milliseconds that a "
            "request is to have; 0: none",
            "PLACEMENT=elastic 或 ROLES=auto 时每个输出 token 的平均间隔目标（毫秒）；0 表示没有", reload=True),
    Setting("max_queue", "MAX_QUEUE", "--max-queue", "4096", values.limit,
            "requests that may wait for capacity, then 429",
            "可排队等待的请求数，超出返回 429", reload=True),
    Setting("queue_timeout", "QUEUE_TIMEOUT", "--queue-timeout", "120", values.seconds,
            "seconds that a request may wait for capacity, then 429",
            "请求排队等待的最长秒数，超时返回 429", reload=True),
    Setting("prefill_policy", "PREFILL_POLICY", "--prefill-policy", "prefix_aware",
            values.policy(("prefix_aware", *_ANY_POLICY),
                          {"joint": "joint chooses a decode for a prefill, set it as DECODE_POLICY"}),
            "how a prefill is chosen: prefix_aware, least_loaded, power_of_two, round_robin or session",
            "prefill 的选择策略：prefix_aware、least_loaded、power_of_two、round_robin 或 session", reload=True),
    Setting("decode_policy", "DECODE_POLICY", "--decode-policy", "joint",
            values.policy(("joint", *_ANY_POLICY),
                          {"prefix_aware": "a decode computes no prompts, set it as PREFILL_POLICY"}),
            "how a decode is chosen: joint, least_loaded, power_of_two, round_robin or session",
            "decode 的选择策略：joint、least_loaded、power_of_two、round_robin 或 session", reload=True),
    Setting("roles", "ROLES", "--roles", "placement", values.choice("placement", "auto", "announced"),
            "auto assigns prefill or decode to each engine of both roles (kv_both) and moves them by load; announced: "
            "they get requests of either role; placement: auto with PLACEMENT=elastic",
            "auto 为每个双角色实例（kv_both）分配 prefill 或 decode，并按负载调整；announced：两种请求都可分配；"
            "placement：PLACEMENT=elastic 时同 auto", reload=True),
    Setting("session_header", "SESSION_HEADER", "--session-header", "X-Session-Id", values.header_name,
            "header that names a client's session for the policy session; without it the body's user counts",
            "session 策略用来识别会话的请求头；没有时使用请求体的 user", reload=True),
    Setting("load_bound", "LOAD_BOUND", "--load-bound", "2", values.factor,
            "how many times the mean load an instance may have and still get a request for its prefix or session",
            "为前缀或会话亲和而选择实例时，其负载最多为平均负载的多少倍", reload=True),
    Setting("api_key", "API_KEY", "--api-key", "", values.key,
            "key that clients must send as Authorization: Bearer or X-Api-Key, except to /health and /livez",
            "客户端须以 Authorization: Bearer 或 X-Api-Key 携带的密钥（/health 与 /livez 除外）", secret=True),
    Setting("api_keys_file", "API_KEYS_FILE", "--api-keys-file", "", values.path,
            "TOML file of several keys, each with a name and optional limits, models and priority; read again on "
            "SIGHUP; API_KEY stays valid beside it",
            "包含多个密钥的 TOML 文件，每个密钥有名称，可设限额、模型与优先级；收到 SIGHUP 时重新读取；"
            "API_KEY 仍然有效", reload=True),
    Setting("engine_api_key", "ENGINE_API_KEY", "--engine-api-key", "", values.key,
            "key that the instances ask for (vllm serve --api-key); replaces the client's Authorization",
            "实例自身的密钥（vllm serve --api-key）；会替换客户端的 Authorization", secret=True),
    Setting("admin_key", "ADMIN_KEY", "--admin-key", "", values.key,
            "key that opens /admin/drain, /admin/undrain, /admin/role and /admin/instances, which are off without one",
            "/admin/drain、/admin/undrain、/admin/role 与 /admin/instances 的密钥；不设置则关闭这些接口", secret=True),
    Setting("kv_secret", "DISAGG_KV_SECRET", "--kv-secret", "", values.key,
            "secret shared with engines of the disagg_kv connector, if they have one",
            "与使用本项目连接器的实例共享的密钥（若已设置）", secret=True),
    Setting("kv_secret_file", "DISAGG_KV_SECRET_FILE", "--kv-secret-file", "", values.path,
            "file with that secret in its first line",
            "首行为该密钥的文件"),
    Setting("cors_origins", "CORS_ORIGINS", "--cors-origins", "", values.origins,
            "browser origins that may call, comma-separated, or *; none by default",
            "允许跨域访问的来源，逗号分隔，或 *；默认不允许"),
    Setting("enable_profiling", "ENABLE_PROFILING", "--enable-profiling", "0", values.flag,
            "1 passes /start_profile and /stop_profile on to every instance",
            "设为 1 时将 /start_profile 与 /stop_profile 转发给所有实例", reload=True),
    Setting("served_by_header", "SERVED_BY_HEADER", "--served-by-header", "0", values.flag,
            "1 names the engines in X-Served-By on the answers of generation requests, with their addresses",
            "设为 1 时在生成请求的回答中以 X-Served-By 给出所用实例的地址"),
    Setting("stream_error_event", "STREAM_ERROR_EVENT", "--stream-error-event", "0", values.flag,
            "1 sends an error event, in the shape of the API in use, before a stream is cut",
            "设为 1 时在切断流式回答之前，按所用 API 的格式发送一个错误事件"),
    Setting("log_level", "LOG_LEVEL", "--log-level", "info",
            values.choice("debug", "info", "warning", "error"),
            "debug, info, warning or error",
            "日志级别：debug、info、warning 或 error", reload=True),
    Setting("log_format", "LOG_FORMAT", "--log-format", "text", values.choice("text", "json"),
            "text, or json for one JSON object a line",
            "text，或 json（每行一个 JSON 对象）", reload=True),
    Setting("power_status_file", "POWER_STATUS_FILE", "--power-status-file", "", values.path,
            "file in which the process that sets GPU clocks says what is set (docs/clocks.md); for events and metrics",
            "设置 GPU 时钟的进程所写的状态文件（docs/clocks.md），用于事件与指标"),
    Setting("access_log", "ACCESS_LOG", "--access-log", "off", values.access_log,
            "a line of JSON for each generation request when it ends: off, a file, or a dash (-) for standard output",
            "每个生成请求结束时写一行 JSON：off 表示关闭，- 表示标准输出，或文件路径"),
    Setting("traces", "TRACES", "--traces", "0", values.traces,
            "1 exports OpenTelemetry traces by OTLP over HTTP to where the OTEL_* variables say",
            "设为 1 时通过 OTLP/HTTP 导出 OpenTelemetry 链路；目的地由 OTEL_* 环境变量决定"),
)
# fmt: on
