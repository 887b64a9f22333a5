# shellcheck shell=bash
# The one table of messages: key, English, Chinese; %s are filled in. The language is the locale's.

MESSAGE_TABLE=$(
  cat <<'TABLE'
usage|Usage: %s [COMMAND]; without a command, on a terminal: the menu. `help` lists everything.|用法：%s [命令]；在终端中不带命令则显示菜单。`help` 列出全部内容。
help_commands|Commands:|命令：
help_settings|Settings, by environment variable or in the file named by CONFIG:|设置，用环境变量或 CONFIG 指定的文件：
help_exit_codes|Exit codes: 0 all went well; 1 something failed; 2 wrong usage or a bad setting; 3 nothing is running; 130 interrupted; 143 terminated.|退出码：0 成功；1 失败；2 用法或设置有误；3 没有在运行；130 被中断；143 被终止。
help_completion|Completion in bash: source %s (its first lines say how in zsh).|bash 补全：source %s（zsh 的用法见该文件开头）。
help_menu|the menu|菜单
help_proxy|the proxy in the foreground; Ctrl+C stops it|在前台运行代理，Ctrl+C 停止
help_prefill|the N-th prefill engine in the foreground|在前台运行第 N 个 prefill 引擎
help_decode|the N-th decode engine in the foreground|在前台运行第 N 个 decode 引擎
help_all|everything in the background; returns when it can serve|在后台启动全部，可服务时返回
help_test|real requests: completion, stream, chat|发送真实请求：补全、流式、对话
help_status|each process, its ports, readiness and restarts, GPU memory|各进程、端口、就绪状态、重启次数与显存
help_logs|the last lines of the logs; -f follows|日志末尾；-f 持续跟踪
help_stop|stop everything, or the parts that are named|停止全部或指定的部分
help_restart|restart parts, with the prefills that depend on a decode|重启指定部分，以及依赖该 decode 的 prefill
help_config|every setting, its value and where it comes from|所有设置、取值与来源
help_doctor|check this machine, with remedies|检查本机并给出解决办法
help_bench|a report over request rates, by vllm bench serve through the proxy; --ratio: of every split of the GPUs into prefill and decode; --against-plain: beside plain engines on the same GPUs; --once: one load, no report|按请求速率生成报告（经代理运行 vllm bench serve）；--ratio：比较 GPU 在 prefill 与 decode 之间的各种分配；--against-plain：与同样 GPU 上的普通引擎对比；--once：只跑一次负载，不生成报告
help_env|the exact commands that would be run|将要执行的完整命令
help_page|the address of the live page; opened where there is a desktop|实时页面的网址；有桌面时自动打开
help_top|the live page in this terminal; q leaves|在终端中查看实时状态，按 q 退出
help_help|this text|本说明
menu_title|vLLM prefill/decode disaggregation on one machine|单机 vLLM prefill/decode 分离部署
menu_prompt|Your choice: |请选择：
menu_which|Which part (proxy, prefill, decode, …): |哪一部分（proxy、prefill、decode ……）：
menu_quit|quit|退出
menu_unknown|There is no entry "%s".|没有选项“%s”。
menu_ended|`%s` ended with exit code %s.|`%s` 以退出码 %s 结束。
menu_proxy|start the proxy (foreground)|启动代理（前台）
menu_prefill|start the prefill engine (foreground)|启动 prefill 引擎（前台）
menu_decode|start the decode engine (foreground)|启动 decode 引擎（前台）
menu_all|start everything in the background|在后台启动全部
menu_test|check and test the service|检查并测试服务
menu_config|show the configuration|显示配置
menu_status|show what runs|显示运行状态
menu_logs|show the ends of the logs|显示日志末尾
menu_stop|stop everything|停止全部
menu_restart|restart one part|重启某一部分
menu_doctor|check this machine|检查本机
menu_bench|measure|性能测试
menu_bench_how|1 report over request rates, 2 which P:D ratio, 3 against plain engines, 4 one short load [1]: |1 按请求速率的报告，2 哪种 P:D 比例，3 与普通引擎对比，4 一次短负载 [1]：
menu_env|show the commands that would be run|显示将要执行的命令
menu_page|the live page in a browser|浏览器中的实时页面
menu_top|the live page in this terminal|终端中的实时状态
menu_help|help|帮助
unknown_command|unknown command "%s"|未知命令“%s”
unknown_argument|%s does not take "%s"|%s 不接受“%s”
which_part|%s needs the name of a part|%s 需要指定部分的名称
no_such_part|there is no part "%s"; there are: %s|没有“%s”；现有：%s
no_proc|this script needs Linux (/proc)|本脚本需要 Linux（/proc）
config_unreadable|CONFIG: cannot read %s|CONFIG：无法读取 %s
config_bad_line|CONFIG: %s, line %s is not NAME=value|CONFIG：%s 第 %s 行不是 NAME=value
config_passed_on|%s in %s is no setting of this script; it is passed on to the programs as an environment variable.|%s（在 %s 中）不是本脚本的设置，作为环境变量传给各程序。
bad_setting|%s="%s": %s|%s="%s"：%s
bad_quotes|cannot read these arguments, a quote is open: %s|无法解析参数，引号未闭合：%s
want_one_line|must be one line|必须是单行
want_port|must be a port, 1 to 65535|必须是端口号，1 到 65535
want_count|must be a whole number, 1 or more|必须是不小于 1 的整数
want_number|must be a number such as 8e9|必须是数字，如 8e9
want_fraction|must be above 0 and at most 1|必须大于 0 且不超过 1
want_rates|must be numbers above 0 such as 1 2 4 8|必须是大于 0 的数字，如 1 2 4 8
want_flag|must be 0 or 1|必须是 0 或 1
want_choice|must be one of %s|必须是以下之一：%s
want_host|must be a host name or an address|必须是主机名或地址
want_gpu|must be a GPU number, or several as 0+1|必须是 GPU 编号，或 0+1 形式的多个
want_gpus|must be GPU numbers such as 0,1 or 0+1,2+3|必须是 GPU 编号，如 0,1 或 0+1,2+3
want_word|must be a word of letters, digits, dots, dashes|只能包含字母、数字、点和横线
want_names|must be names separated by commas, without blanks|必须是逗号分隔、不含空格的名称
source_environment|(environment)|（环境变量）
source_file|(CONFIG file)|（CONFIG 文件）
source_running|(what runs now)|（当前运行）
source_default|(default)|（默认）
cannot_make_dir|cannot make the folder %s|无法创建目录 %s
dir_not_ours|the folder %s is not yours or cannot be written; set RUN_DIR and LOG_DIR to others|目录 %s 不属于当前用户或不可写；请用 RUN_DIR、LOG_DIR 指定其他目录
busy|another `%s` (PID %s) is at work in this RUN_DIR; try again when it has ended, or `stop`|本 RUN_DIR 中另一个 `%s`（PID %s）正在执行；等其结束后重试，或使用 `stop`
no_python|no Python found as "%s"; set PYTHON to one of 3.10 or newer|找不到 Python “%s”；请用 PYTHON 指定 3.10 或更新的版本
python_too_old|%s is %s; 3.10 or newer is needed, set PYTHON|%s 是 %s；需要 3.10 或更新的版本，请设置 PYTHON
python_chosen|Python: %s (has everything that the proxy needs)|Python：%s（已具备代理所需的包）
python_venv|Python: %s (the virtual environment)|Python：%s（虚拟环境）
python_lacks|%s lacks or has too old: %s|%s 缺少或版本过旧：%s
venv_making|Making a virtual environment in %s; this takes a minute, its log is %s|正在 %s 创建虚拟环境，约需一分钟，日志：%s
venv_updating|Bringing the virtual environment in %s up to date; its log is %s|正在更新虚拟环境 %s，日志：%s
venv_made|The virtual environment in %s is ready.|虚拟环境 %s 已就绪。
venv_failed|the virtual environment could not be made; see %s. Behind a firewall set PIP_INDEX_URL to a reachable index, or point PYTHON at an environment that has the packages.|虚拟环境创建失败，见 %s。若网络受限，请将 PIP_INDEX_URL 设为可达的镜像，或用 PYTHON 指定已有这些包的环境。
venv_not_ours|VENV_DIR=%s is a folder with something else in it; name another|VENV_DIR=%s 中已有其他内容，请另选目录
no_venv_module|this Python cannot make virtual environments. Run: %s|该 Python 无法创建虚拟环境。请执行：%s
install_venv_module|install the %s package of your system|安装系统的 %s 软件包
no_vllm|no vLLM found, neither `vllm` on PATH nor in PYTHON. Install it: pip install -r requirements.txt, or use ENGINE=sim|未找到 vLLM：PATH 中没有 `vllm`，PYTHON 中也没有。请安装：pip install -r requirements.txt，或使用 ENGINE=sim
vllm_too_old|vLLM %s is too old for any KV connector that this project knows. Install another version: pip install "vllm>=0.21"|vLLM %s 过旧，本项目已知的 KV connector 均不可用。请安装其他版本：pip install "vllm>=0.21"
vllm_no_connector|vLLM %s has no P2pNcclConnector (it was removed in 0.24, vllm-project/vllm#44854). Use this project's own connector (vLLM 0.21 or newer): KV_CONNECTOR=own, or auto; or install a version that has the other: pip install "vllm>=0.18,<0.24"|vLLM %s 没有 P2pNcclConnector（自 0.24 起移除，vllm-project/vllm#44854）。请使用本项目的 connector（vLLM 0.21 或更新）：KV_CONNECTOR=own 或 auto；或安装仍包含它的版本：pip install "vllm>=0.18,<0.24"
vllm_random_ids|vLLM %s makes request ids random and cannot be told not to, so decode would wait for ever. Install another version: pip install "vllm>=0.21"|vLLM %s 会随机化请求 ID 且无法关闭，decode 将永远等待。请安装其他版本：pip install "vllm>=0.21"
own_too_old|KV_CONNECTOR=own needs vLLM 0.21 or newer, this is %s. Install it: pip install "vllm>=0.21"; or leave KV_CONNECTOR at auto (P2pNcclConnector, vLLM 0.9.2 to 0.13 and 0.17 to 0.23)|KV_CONNECTOR=own 需要 vLLM 0.21 或更新版本，当前为 %s。请安装：pip install "vllm>=0.21"；或将 KV_CONNECTOR 保持为 auto（P2pNcclConnector，vLLM 0.9.2 至 0.13 与 0.17 至 0.23）
own_wants_ip|ENGINE_HOST=%s is a name; this project's connector needs an IP address: set ENGINE_HOST to one|ENGINE_HOST=%s 是主机名；本项目的 connector 需要 IP 地址：请将 ENGINE_HOST 设为 IP 地址
own_untried|This project's connector was tried with vLLM 0.21 to 0.33, not with %s.|本项目的 connector 在 vLLM 0.21 至 0.33 上验证过，未在 %s 上验证。
connector_own|this project's connector (disagg_kv)|本项目的 connector（disagg_kv）
too_few_gpus|ENGINE=vllm needs two GPUs, nvidia-smi shows %s. Without them: ENGINE=sim|ENGINE=vllm 需要两块 GPU，nvidia-smi 显示 %s 块。没有时请用 ENGINE=sim
no_such_gpu|GPU %s of %s does not exist; there are: %s|GPU %s（%s）不存在；现有：%s
gpu_shared|GPU %s would hold both a prefill and a decode engine; NCCL refuses two ranks on one GPU. Give them different ones (PREFILL_GPU, DECODE_GPU)|GPU %s 同时分给了 prefill 和 decode，NCCL 不允许同一 GPU 上有两个 rank。请分开（PREFILL_GPU、DECODE_GPU）
gpu_not_countable|GPU "%s" is no number, so TENSOR_PARALLEL=%s cannot count up from it; write the GPUs as a+b|GPU “%s”不是编号，无法按 TENSOR_PARALLEL=%s 递增；请写成 a+b
gpu_count_differs|"%s" does not name TENSOR_PARALLEL=%s GPUs|“%s”的 GPU 数与 TENSOR_PARALLEL=%s 不符
unequal_parallel|%s has another number of GPUs than the engines before it; prefill and decode need the same tensor parallel size|%s 的 GPU 数与之前的引擎不同；prefill 与 decode 的张量并行数须相同
port_twice|port %s is given both to %s and to %s|端口 %s 同时分给了 %s 和 %s
ports_run_out|no ports left above %s|%s 之上已无可用端口
port_taken|port %s, for %s, is taken: %s|端口 %s（用于 %s）已被占用：%s
held_by|held by PID %s (%s)|被 PID %s（%s）占用
held_by_other|held by a process of another user|被其他用户的进程占用
ports_remedy|Stop the holder, or choose other ports (HTTP_PROXY_PORT, PROXY_PORT, PREFILL_HTTP_PORT, DECODE_HTTP_PORT, PREFILL_KV_PORT, DECODE_KV_PORT).|请停止占用者，或改用其他端口（HTTP_PROXY_PORT、PROXY_PORT、PREFILL_HTTP_PORT、DECODE_HTTP_PORT、PREFILL_KV_PORT、DECODE_KV_PORT）。
why_asked|ENGINE=sim|ENGINE=sim
why_gpus|%s GPU(s) found, two are needed|找到 %s 块 GPU，需要两块
why_no_vllm|no vLLM found|未找到 vLLM
loud_sim|SIMULATED ENGINES: no model runs, the answers are made up.|模拟引擎：没有运行真实模型，回答是编造的。
loud_why|Why: %s|原因：%s
loud_sim_how|For real ones: two GPUs and `pip install -r requirements.txt`; `doctor` says what is missing.|要用真实引擎：两块 GPU 并执行 `pip install -r requirements.txt`；`doctor` 说明缺少什么。
using_vllm|vLLM %s with %s: %s|vLLM %s，使用 %s：%s
chunked_warning|Prefill runs in chunks (MAX_NUM_BATCHED_TOKENS=%s, MAX_MODEL_LEN=%s): a chunk that ends inside the last block ends the prefill engine (an assertion of the connector). Where memory allows, set MAX_NUM_BATCHED_TOKENS to MAX_MODEL_LEN; before vLLM 0.14 that makes it rarer only.|prefill 分块执行（MAX_NUM_BATCHED_TOKENS=%s，MAX_MODEL_LEN=%s）：在最后一个块内结束的分块会使 prefill 引擎退出（连接器断言）。显存允许时请将 MAX_NUM_BATCHED_TOKENS 设为 MAX_MODEL_LEN；vLLM 0.14 之前这只能降低概率。
part_proxy|  proxy: HTTP port %s, registration port %s|  proxy：HTTP 端口 %s，注册端口 %s
part_engine|  %s: HTTP port %s, KV port %s, %s|  %s：HTTP 端口 %s，KV 端口 %s，%s
on_gpu|GPU %s|GPU %s
simulated|simulated|模拟
already_running|Already running: %s. Requests go to %s; `stop` ends it.|已在运行：%s。请求发往 %s；用 `stop` 停止。
partly_running|runs: %s; does not: %s. `restart NAME` brings a part back, `stop` ends everything.|在运行：%s；未运行：%s。`restart NAME` 恢复某一部分，`stop` 停止全部。
part_runs|%s already runs (PID %s).|%s 已在运行（PID %s）。
waiting_for|Waiting for %s, %s s|等待 %s，%s 秒
wait_proxy|the proxy|代理
wait_engine|%s to answer|%s 响应
wait_shared|%s to be ready, %s shares its GPU|%s 就绪（%s 与其共用 GPU）
wait_pairs|the proxy to admit the engines|代理接纳各引擎
part_died|%s (PID %s) ended while it started|%s（PID %s）在启动中退出
part_ended|%s ended with status %s|%s 以状态 %s 结束
start_timeout|gave up waiting for %s after %s s (START_TIMEOUT)|等待 %s 超过 %s 秒（START_TIMEOUT），放弃
log_tail|Last lines (at most %s) of %s:|%2$s 的最后几行（最多 %1$s 行）：
hint_memory|The GPU has too little free memory: look with nvidia-smi who uses it, or lower PREFILL_GPU_MEMORY_UTILIZATION, DECODE_GPU_MEMORY_UTILIZATION, MAX_MODEL_LEN or MAX_NUM_BATCHED_TOKENS.|GPU 空闲显存不足：用 nvidia-smi 查看占用者，或降低 PREFILL_GPU_MEMORY_UTILIZATION、DECODE_GPU_MEMORY_UTILIZATION、MAX_MODEL_LEN、MAX_NUM_BATCHED_TOKENS。
hint_port|A port was taken at the last moment; `doctor` shows by whom.|端口在最后时刻被占用；`doctor` 可显示占用者。
hint_model|MODEL=%s was found neither as a folder nor at Hugging Face.|MODEL=%s 既不是目录，也不在 Hugging Face 上。
hint_duplicate|NCCL refuses a prefill and a decode engine on one GPU.|NCCL 不允许 prefill 与 decode 在同一 GPU 上。
interrupted|Interrupted.|已中断。
rolling_back|Stopping what was started: %s|正在停止已启动的部分：%s
killing|%s (process group %s) did not end within %s s after TERM: KILL|%s（进程组 %s）在 TERM 后 %s 秒内未结束：发送 KILL
all_ready|Everything is ready: %s|全部就绪：%s
try_it|Try it:|试一试：
watch_it|Watch it work: %s/  (or `top` in a terminal)|实时观察：%s/（或在终端中用 `top`）
page_opened|Opened in the browser.|已在浏览器中打开。
page_hint|Open it in a browser. From another machine: ssh -L %1$s:%2$s this-machine, then http://127.0.0.1:%1$s/|请在浏览器中打开。若在另一台机器上：ssh -L %1$s:%2$s 本机，然后访问 http://127.0.0.1:%1$s/
page_key|The page asks for the key: it is API_KEY.|页面会要求输入密钥，即 API_KEY。
top_installing|`top` needs the package rich: installing it into %s; the log is %s|`top` 需要 rich 包：正在安装到 %s，日志：%s
top_no_rich|`top` needs the package rich. Run: %s -m pip install -r requirements-top.txt|`top` 需要 rich 包。请执行：%s -m pip install -r requirements-top.txt
next_commands|Next: %s test, then status, logs, stop|接下来：%s test，以及 status、logs、stop
nothing_runs|Nothing is running.|没有在运行的进程。
not_running|%s is not running|%s 没有在运行
stopped|Stopped: %s|已停止：%s
stopped_decode|%1$s is a decode engine: prefills that have sent to it must be restarted with it; `restart %1$s` does that.|%1$s 是 decode 引擎：向它发送过 KV 的 prefill 需一并重启；`restart %1$s` 会处理。
interrupting_all|Another `all` (PID %s) is still starting; it is told to give up.|另一个 `all`（PID %s）仍在启动，已通知其放弃。
restart_prefills|%s sent KV to %s and would stay frozen: restarted too.|%s 向 %s 发送过 KV，会一直卡住：一并重启。
in_foreground|%s runs in a terminal of its own; stop it there with Ctrl+C|%s 在自己的终端中运行，请在那里用 Ctrl+C 停止
restarted|Restarted: %s|已重启：%s
foreground|%s runs here, ports %s. Ctrl+C stops it.|%s 在此运行，端口 %s。按 Ctrl+C 停止。
foreground_first|This is %s; for the next one: %s 2, in another terminal.|这是 %s；下一个请在另一个终端执行：%s 2。
stopping|Stopping %s|正在停止 %s
no_proxy|no proxy answers at %s. Start everything with `all`|%s 没有代理响应。请用 `all` 启动
test_model|model: %s|模型：%s
test_times|%s s, first piece after %s s, %s tokens, %s|%s 秒，首段 %s 秒，%s 个 token，%s
test_problem|%s: %s|%s：%s
test_skipped|%s was skipped: %s|%s 已跳过：%s
test_failed|the test failed; `status` and `logs` say more|测试失败；详见 `status` 与 `logs`
test_ok|All requests were answered through a prefill and a decode engine.|所有请求均经 prefill 与 decode 引擎得到回答。
bench_simulated|No vLLM engines here: a small load of this script's own on what runs. Its figures say nothing about GPUs.|此处没有 vLLM 引擎：用本脚本的小负载测试，数字与 GPU 性能无关。
bench_sim_figures|SIMULATED ENGINES: these figures say nothing about GPUs.|模拟引擎：这些数字与 GPU 性能无关。
bench_own_client|The load generator is this project's own, not vllm bench serve; the report says so.|负载生成器为本项目自带，不是 vllm bench serve；报告中会注明。
bench_once_alone|--once takes neither --ratio nor --against-plain|--once 不能与 --ratio 或 --against-plain 同用
bench_no_pair|the proxy at %s has no prefill and decode ready; see `status`|%s 的代理没有就绪的 prefill 与 decode；请看 `status`
bench_too_long|BENCH_INPUT_LEN=%s and BENCH_OUTPUT_LEN=%s are together more than MAX_MODEL_LEN=%s|BENCH_INPUT_LEN=%s 与 BENCH_OUTPUT_LEN=%s 之和超过 MAX_MODEL_LEN=%s
bench_folder|The report goes to %s; Ctrl+C ends it and keeps what was measured.|报告写入 %s；按 Ctrl+C 结束并保留已测结果。
bench_not_ours|what serves at %s was not started with `all`; --against-plain must be able to stop it and start it again|%s 上的服务不是由 `all` 启动的；--against-plain 需要能停止并重新启动它
bench_pool_small|%s GPU(s) or engines to divide; two are needed at least|可分配的 GPU 或引擎只有 %s 个，至少需要两个
bench_pool_twice|GPU %s is named twice; this comparison needs each engine on GPUs of its own|GPU %s 被指定了两次；此比较要求每个引擎独占 GPU
bench_setup|Next setup: %s (%s of %s)|下一种部署：%s（第 %s 种，共 %s 种）
bench_restoring|Starting again what ran before.|重新启动之前运行的部署。
bench_nothing|nothing was measured; no report in %s|没有测得任何结果；%s 中没有报告
no_log|there is no log of "%s" in %s|%2$s 中没有“%1$s”的日志
no_logs|there are no logs in %s|%s 中没有日志
env_sim|These are simulated engines (%s). ENGINE=vllm prints the commands for vLLM.|这里是模拟引擎（%s）。ENGINE=vllm 可显示 vLLM 的命令。
env_no_vllm|No vLLM found here; the commands are those for %s.|此处未找到 vLLM；以下为 %s 版本的命令。
status_watching|watching|监护中
status_pairs|%s pair(s)|%s 对
status_silent|does not answer|无响应
status_loading|loading|加载中
status_bad|its /health answers %s|其 /health 返回 %s
status_no_pair|no request can be served: %s|无法处理任何请求：%s
status_proxy_says|proxy: %s; %s requests so far|代理：%s；累计 %s 个请求
status_flying|%s, %s in flight (%s)|%s，在途 %s（%s）
status_unknown|answers; the proxy does not know it|有响应；代理尚未接纳
status_restarts|restarts: %s; last %s: %s|重启 %s 次；最近 %s：%s
status_given_up|given up; see %s, then `restart`|已放弃重启；查看 %s 后执行 `restart`
status_wanted|`restart %s` brings it back|`restart %s` 可恢复
status_wanted_terminal|stop it in its terminal with Ctrl+C and start it again|请在其终端中按 Ctrl+C 停止并重新启动
status_sim|The engines are SIMULATED: no model runs.|引擎是模拟的：没有运行真实模型。
sup_watching|watching: %s|开始监护：%s
sup_ends|the supervisor ends|监护进程结束
sup_died|%s (PID %s) died; restart in %s s (death %s, limit %s)|%s（PID %s）退出；%s 秒后重启（第 %s 次，上限 %s）
sup_ended|%s (PID %s) was ended; restart in %s s (death %s, limit %s)|%s（PID %s）已被结束；%s 秒后重启（第 %s 次，上限 %s）
sup_frozen|%s (PID %s) is frozen, says the proxy (%s), and is ended|代理报告 %s（PID %s）已卡住（%s），将其结束
sup_frozen_terminal|%s (PID %s) is frozen, says the proxy (%s), but runs in a terminal of its own: stop it there with Ctrl+C and start it again|代理报告 %s（PID %s）已卡住（%s），但它在自己的终端中运行：请在那里按 Ctrl+C 停止并重新启动
sup_partner|%s (PID %s) has sent KV to %s and would stay frozen: restarted|%s（PID %s）向 %s 发送过 KV，会一直卡住：重启
sup_partner_terminal|%s (PID %s) has sent KV to %s and would stay frozen, but runs in a terminal of its own: stop it there with Ctrl+C and start it again|%s（PID %s）向 %s 发送过 KV，会一直卡住，但它在自己的终端中运行：请在那里按 Ctrl+C 停止并重新启动
sup_given_up|%s died or froze %s times within %s s: given up. The end of its log:|%1$s 在 %3$s 秒内退出或卡住 %2$s 次：放弃重启。其日志末尾：
sup_why_died|PID %s died|PID %s 退出
sup_why_froze|PID %s was frozen: %s|PID %s 卡住：%s
sup_why_partner|it had sent KV to %s, which ended|它向 %s 发送过 KV，而后者已结束
sup_why_loop|gone %s times, at last: %s|共 %s 次，最后一次：%s
sup_port|%s waits: port %s is %s|%s 等待：端口 %s %s
sup_started|%s started again, PID %s|%s 已重新启动，PID %s
sup_log_mark|===== %s is started again by the supervisor =====|===== %s 由监护进程重新启动 =====
doctor_ok|ok|正常
doctor_warning|warning|警告
doctor_error|error|错误
doctor_bad|%s error(s), %s warning(s)|%s 个错误，%s 个警告
doctor_good|No errors, %s warning(s).|没有错误，%s 个警告。
doc_python|Python: %s, %s|Python：%s，%s
doc_packages|the proxy's packages: in %s|代理所需的包：位于 %s
doc_packages_later|not installed: %s; `all` installs them into %s|未安装：%s；`all` 会安装到 %s
doc_no_venv|not installed: %s; and this Python cannot make a virtual environment. Run: %s|未安装：%s；且该 Python 无法创建虚拟环境。请执行：%s
doc_sim_asked|vLLM: not needed, ENGINE=sim|vLLM：不需要，ENGINE=sim
doc_vllm|vLLM %s with %s: %s|vLLM %s，使用 %s：%s
doc_random_set|request ids: kept as they are (VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 is set for both engines)|请求 ID：保持不变（两个引擎均设置 VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1）
doc_random_zero|your environment sets VLLM_DISABLE_REQUEST_ID_RANDOMIZATION to something else than 1; this script sets 1 for its engines, engines you start yourself would hang|环境中 VLLM_DISABLE_REQUEST_ID_RANDOMIZATION 不是 1；本脚本会为其引擎设为 1，您自行启动的引擎会挂起
doc_random_none|request ids: this vLLM does not randomise them|请求 ID：该版本 vLLM 不随机化
doc_secret|KV ports: engines and proxy prove that they know DISAGG_KV_SECRET|KV 端口：引擎与代理须证明知道 DISAGG_KV_SECRET
doc_no_secret|KV ports are open on %s and DISAGG_KV_SECRET is not set: whoever reaches them can ask for KV; set a secret|KV 端口在 %s 上开放且未设置 DISAGG_KV_SECRET：任何能连接的人都可索取 KV；请设置密钥
doc_few_gpus|%s GPU(s) shown by nvidia-smi: engines will be simulated|nvidia-smi 显示 %s 块 GPU：将使用模拟引擎
doc_gpu|GPU %s: %s, %s of %s MiB free|GPU %s：%s，空闲 %s / %s MiB
doc_gpu_over|GPU %s: its engines ask for %s %% of it together; lower PREFILL_GPU_MEMORY_UTILIZATION or DECODE_GPU_MEMORY_UTILIZATION|GPU %s：其上引擎共要求 %s%% 显存；请降低 PREFILL_GPU_MEMORY_UTILIZATION 或 DECODE_GPU_MEMORY_UTILIZATION
doc_gpu_busy|GPU %s: %s MiB free, %s MiB wanted for %s; stop what uses it, or lower the GPU memory utilization|GPU %1$s：空闲 %2$s MiB，%4$s 需要 %3$s MiB；请停止占用者或降低显存占比
doc_gpu_free|GPU %s: %s MiB free, %s MiB wanted for %s|GPU %1$s：空闲 %2$s MiB，%4$s 需要 %3$s MiB
doc_buffer|KV buffer of %s on GPU %s: %s MiB beside vLLM's share, %s MiB wanted|%s 在 GPU %s 上的 KV 缓冲：vLLM 占比之外有 %s MiB，需要 %s MiB
doc_buffer_big|KV buffer of %s on GPU %s: %s MiB beside vLLM's share, %s MiB wanted; lower KV_BUFFER_SIZE or DECODE_GPU_MEMORY_UTILIZATION|%s 在 GPU %s 上的 KV 缓冲：vLLM 占比之外有 %s MiB，需要 %s MiB；请降低 KV_BUFFER_SIZE 或 DECODE_GPU_MEMORY_UTILIZATION
doc_staging|staging buffers of %s on GPU %s: %s MiB beside vLLM's share, %s MiB wanted|%s 在 GPU %s 上的中转缓冲：vLLM 占比之外有 %s MiB，需要 %s MiB
doc_staging_big|staging buffers of %s on GPU %s: %s MiB beside vLLM's share, %s MiB wanted; lower GPU_MEMORY_UTILIZATION|%s 在 GPU %s 上的中转缓冲：vLLM 占比之外有 %s MiB，需要 %s MiB；请降低 GPU_MEMORY_UTILIZATION
doc_link_nvlink|%s to %s: NVLink (%s)|%s 到 %s：NVLink（%s）
doc_link_pci|%s to %s: no NVLink, the way is %s; KV transfer is slower. Other GPUs may be closer: nvidia-smi topo -m|%s 到 %s：没有 NVLink，路径为 %s，KV 传输较慢。其他 GPU 可能更近：nvidia-smi topo -m
doc_link_unknown|%s to %s: nvidia-smi topo does not say how they are connected|%s 到 %s：nvidia-smi topo 未给出连接方式
doc_peer|%s to %s: peer access|%s 到 %s：支持对等访问
doc_no_peer|%s to %s: no peer access (%s); KV goes through host memory|%s 到 %s：不支持对等访问（%s），KV 经主机内存传输
doc_ports|ports of %s are free: %s|%s 的端口空闲：%s
doc_model|model: %s (%s)|模型：%s（%s）
doc_model_missing|MODEL=%s is not a readable folder with a config.json|MODEL=%s 不是包含 config.json 的可读目录
doc_no_tokenizer|MODEL=%s has no tokenizer file|MODEL=%s 中没有分词器文件
doc_no_weights|MODEL=%s has no weights (*.safetensors, *.bin)|MODEL=%s 中没有权重文件（*.safetensors、*.bin）
doc_model_unused|model: %s, only its name is used with simulated engines|模型：%s，模拟引擎只使用其名称
doc_model_cached|model: %s is in %s|模型：%s 已在 %s
doc_model_offline|MODEL=%s is not in %s, and HF_HUB_OFFLINE=1 forbids the download|MODEL=%s 不在 %s，且 HF_HUB_OFFLINE=1 禁止下载
doc_model_disk|MODEL=%s must be downloaded, and there are only %s GiB free at %s|MODEL=%1$s 需要下载，但 %3$s 仅剩 %2$s GiB
doc_model_download|MODEL=%s will be downloaded at the first start; %s GiB free at %s|MODEL=%1$s 将在首次启动时下载；%3$s 空闲 %2$s GiB
doc_pool|pinned host memory: %s GiB wanted, %s GiB available|锁页内存：需要 %s GiB，可用 %s GiB
doc_pool_big|pinned host memory: %s GiB wanted, only %s GiB available; lower MEM_POOL_SIZE_GB|锁页内存：需要 %s GiB，仅有 %s GiB；请降低 MEM_POOL_SIZE_GB
doc_disk|disk for logs at %s: %s GiB free|日志目录 %s：空闲 %s GiB
doc_log_disk|less than 1 GiB free at %s; set LOG_DIR to another disk|%s 空闲不足 1 GiB；请将 LOG_DIR 设到其他磁盘
doc_files|open files allowed: %s|允许打开的文件数：%s
doc_files_low|only %s open files allowed; many requests at once need more: ulimit -n 65536|仅允许打开 %s 个文件；高并发需要更多：ulimit -n 65536
doc_shm|/dev/shm has %s MiB free; tensor parallel needs about 1 GiB (docker: --shm-size 4g)|/dev/shm 空闲 %s MiB；张量并行约需 1 GiB（docker：--shm-size 4g）
doc_run_dir|nothing stale in %s|%s 中没有陈旧文件
doc_stale_dead|%s: its PID file names PID %s, which is gone, started %s min ago; `stop` clears it|%s：PID 文件中的进程 %s 已不存在，启动于 %s 分钟前；`stop` 可清理
doc_stale_reused|%s: its PID file names PID %s, which is another process by now, started %s min ago; `stop` clears it and leaves that process alone|%s：PID 文件中的 PID %s 现属于其他进程，启动于 %s 分钟前；`stop` 会清理文件且不影响该进程
doc_clock|%s: its PID file is from the future; the clock was set back|%s：PID 文件时间在未来；系统时钟曾被回拨
doc_frozen|%s is frozen, says the proxy: %s. `restart %s` brings it back|代理报告 %s 已卡住：%s。`restart %s` 可恢复
doc_hung|%s runs, but %s. `restart %s` brings it back|%s 在运行，但%s。`restart %s` 可恢复
doc_no_pair|no request can be served: %s|无法处理任何请求：%s
TABLE
)
readonly MESSAGE_TABLE
