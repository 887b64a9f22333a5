"""English texts by key; ``{}`` are filled in, in order. The Chinese ones: :mod:`disagg_machine.messages.chinese`."""

from __future__ import annotations

TEXTS: dict[str, str] = {
    "usage": "Usage: {} [COMMAND]; without a command, on a terminal: the menu. `help` lists everything.",
    "help_commands": "Commands:",
    "help_settings": "Settings, by environment variable or in the file named by CONFIG:",
    "help_exit_codes": (
        "Exit codes: 0 all went well; 1 something failed; 2 wrong usage or a bad setting; 3 nothing is running; "
        "130 interrupted; 143 terminated."
    ),
    "help_completion": "Completion in bash, zsh and fish: in {}; the first lines of each file say how.",
    "help_menu": "the menu",
    "help_proxy": "the proxy in the foreground; Ctrl+C stops it",
    "help_prefill": "the N-th prefill engine in the foreground",
    "help_decode": "the N-th decode engine in the foreground",
    "help_all": (
        "everything in the background; returns when it can serve; --foreground: stays until a signal, which stops "
        "everything"
    ),
    "foreground_ended": "{} ended by itself; the logs are in {}. Everything is stopped.",
    "help_test": "real requests: completion, stream, chat",
    "help_status": "each process, its ports, readiness and restarts, GPU memory",
    "help_logs": "the last lines of the logs; -f follows",
    "help_stop": "stop everything, or the parts that are named",
    "help_restart": "restart parts, with the prefills that depend on a decode",
    "help_config": "every setting, its value and where it comes from",
    "help_doctor": "check this machine, with remedies",
    "help_bench": (
        "a report over request rates, by vllm bench serve through the proxy; --ratio: of every split of the GPUs "
        "into prefill and decode; --against-plain: beside plain engines on the same GPUs; --clocks: which clock of "
        "each role costs the least energy; --traditional: also a single engine at equal clocks; --once: one load, no "
        "report"
    ),
    "help_env": "the exact commands that would be run",
    "help_page": "the address of the live page; opened where there is a desktop",
    "help_top": "the live page in this terminal; q leaves",
    "help_power": "clocks of the GPUs: what may be set and by what; power reset: undo what a killed guard has left",
    "help_help": "this text",
    "menu_title": "vLLM prefill/decode disaggregation on one machine",
    "menu_prompt": "Your choice: ",
    "menu_which": "Which part (proxy, prefill, decode, …): ",
    "menu_quit": "quit",
    "menu_unknown": 'There is no entry "{}".',
    "menu_ended": "`{}` ended with exit code {}.",
    "menu_proxy": "start the proxy (foreground)",
    "menu_prefill": "start the prefill engine (foreground)",
    "menu_decode": "start the decode engine (foreground)",
    "menu_all": "start everything in the background",
    "menu_test": "check and test the service",
    "menu_config": "show the configuration",
    "menu_status": "show what runs",
    "menu_logs": "show the ends of the logs",
    "menu_stop": "stop everything",
    "menu_restart": "restart one part",
    "menu_doctor": "check this machine",
    "menu_bench": "measure",
    "menu_bench_how": (
        "1 report over request rates, 2 which P:D ratio, 3 against plain engines, 4 one short load, "
        "5 energy over clocks [1]: "
    ),
    "menu_env": "show the commands that would be run",
    "menu_page": "the live page in a browser",
    "menu_top": "the live page in this terminal",
    "menu_power": "the clocks of the GPUs",
    "menu_help": "help",
    "unknown_command": 'unknown command "{}"',
    "unknown_argument": '{} does not take "{}"',
    "which_part": "{} needs the name of a part",
    "no_such_part": 'there is no part "{}"; there are: {}',
    "no_proc": "this script needs Linux (/proc)",
    "config_unreadable": "CONFIG: cannot read {}",
    "config_bad_line": "CONFIG: {}, line {} is not NAME=value",
    "config_passed_on": (
        "{} in {} is no setting of this script; it is passed on to the programs as an environment variable."
    ),
    "bad_setting": '{}="{}": {}',
    "bad_quotes": "cannot read these arguments, a quote is open: {}",
    "want_one_line": "must be one line",
    "want_port": "must be a port, 1 to 65535",
    "want_count": "must be a whole number, 1 or more",
    "want_clock": "must be a clock in MHz such as 1410, or lock:1410 to pin it",
    "want_number": "must be a number such as 8e9",
    "want_fraction": "must be above 0 and at most 1",
    "want_rates": "must be numbers above 0 such as 1 2 4 8",
    "want_flag": "must be 0 or 1",
    "want_choice": "must be one of {}",
    "want_host": "must be a host name or an address",
    "want_gpu": "must be a GPU number, or several as 0+1",
    "want_gpus": "must be GPU numbers such as 0,1 or 0+1,2+3",
    "want_word": "must be a word of letters, digits, dots, dashes",
    "want_names": "must be names separated by commas, without blanks",
    "source_environment": "(environment)",
    "source_file": "(CONFIG file)",
    "source_running": "(what runs now)",
    "source_default": "(default)",
    "cannot_make_dir": "cannot make the folder {}",
    "dir_not_ours": "the folder {} is not yours or cannot be written; set RUN_DIR and LOG_DIR to others",
    "busy": "another `{}` (PID {}) is running in this RUN_DIR; try again when it has finished, or `stop`",
    "no_python": 'no Python found as "{}"; set PYTHON to one of 3.10 or newer',
    "python_too_old": "{} is {}; 3.10 or newer is needed, set PYTHON",
    "python_chosen": "Python: {} (has everything that the proxy needs)",
    "python_venv": "Python: {} (the virtual environment)",
    "python_lacks": "{}: packages missing or too old: {}",
    "venv_making": "Making a virtual environment in {}; this takes a minute, its log is {}",
    "venv_updating": "Bringing the virtual environment in {} up to date; its log is {}",
    "venv_made": "The virtual environment in {} is ready.",
    "venv_failed": (
        "the virtual environment could not be made; see {}. Behind a firewall set PIP_INDEX_URL to a reachable "
        "index, or point PYTHON at an environment that has the packages."
    ),
    "venv_not_ours": "VENV_DIR={} is a folder with something else in it; name another",
    "no_venv_module": "this Python cannot make virtual environments. Run: {}",
    "install_venv_module": "install the {} package of your system",
    "no_vllm": (
        "no vLLM found, neither `vllm` on PATH nor in PYTHON. Install it: pip install -r requirements.txt, or "
        "use ENGINE=sim"
    ),
    "vllm_too_old": (
        "vLLM {} is too old for any KV connector that this project knows. Install another version: pip install "
        '"vllm>=0.21"'
    ),
    "vllm_no_connector": (
        "vLLM {} has no P2pNcclConnector (it was removed in 0.24, vllm-project/vllm#44854). Use this project's "
        "own connector (vLLM 0.21 or newer): KV_CONNECTOR=own, or auto; or install a version that has the other: "
        'pip install "vllm>=0.18,<0.24"'
    ),
    "vllm_random_ids": (
        "vLLM {} makes request ids random and has no switch for it, so decode would never find the KV. Install "
        'another version: pip install "vllm>=0.21"'
    ),
    "own_too_old": (
        'KV_CONNECTOR=own needs vLLM 0.21 or newer, this is {}. Install it: pip install "vllm>=0.21"; or leave '
        "KV_CONNECTOR at auto (P2pNcclConnector, vLLM 0.9.2 to 0.13 and 0.17 to 0.23)"
    ),
    "own_wants_ip": "ENGINE_HOST={} is a name; this project's connector needs an IP address: set ENGINE_HOST to one",
    "own_untried": "This project's connector was tried with vLLM 0.21 to 0.33, not with {}.",
    "connector_own": "this project's connector (disagg_kv)",
    "too_few_gpus": (
        "ENGINE=vllm needs two GPUs, or one and vLLM 0.21 or newer (ALLOW_SHARED_GPU, KV_CONNECTOR); nvidia-smi shows "
        "{}. Without them: ENGINE=sim"
    ),
    "shared_gpu": (
        "Prefill and decode share GPU {}, with {} MiB of KV cache each: good for trying, tests and development. They "
        "compete for the GPU, so this shows neither the latency nor the throughput of a pair on two GPUs."
    ),
    "no_such_gpu": "GPU {} of {} does not exist; there are: {}",
    "gpu_shared": (
        "GPU {} would hold both a prefill and a decode engine; NCCL refuses two ranks on one GPU. Give them "
        "different ones (PREFILL_GPU, DECODE_GPU), or set ALLOW_SHARED_GPU=1 and KV_CONNECTOR=own"
    ),
    "gpu_not_countable": (
        'GPU "{}" is no number, so TENSOR_PARALLEL={} cannot count up from it; write the GPUs as a+b'
    ),
    "gpu_count_differs": '"{}" does not name TENSOR_PARALLEL={} GPUs',
    "unequal_parallel": (
        "{} has another number of GPUs than the engines before it; prefill and decode need the same tensor "
        "parallel size"
    ),
    "port_twice": "port {} is given both to {} and to {}",
    "ports_run_out": "no ports left above {}",
    "port_taken": "port {}, for {}, is taken: {}",
    "held_by": "held by PID {} ({})",
    "held_by_other": "held by a process of another user",
    "ports_remedy": (
        "Stop the holder, or choose other ports (HTTP_PROXY_PORT, PROXY_PORT, PREFILL_HTTP_PORT, "
        "DECODE_HTTP_PORT, PREFILL_KV_PORT, DECODE_KV_PORT)."
    ),
    "why_asked": "ENGINE=sim",
    "why_gpus": "{} GPU(s) found; two are needed, or one and vLLM 0.21 or newer",
    "why_no_vllm": "no vLLM found",
    "loud_sim": "SIMULATED ENGINES: no model runs, the answers are made up.",
    "loud_why": "Why: {}",
    "loud_sim_how": "For real ones: two GPUs and `pip install -r requirements.txt`; `doctor` says what is missing.",
    "using_vllm": "vLLM {} with {}: {}",
    "chunked_warning": (
        "Prefill runs in chunks (MAX_NUM_BATCHED_TOKENS={}, MAX_MODEL_LEN={}): a chunk that ends inside the last "
        "block ends the prefill engine (an assertion of the connector). Where memory allows, set "
        "MAX_NUM_BATCHED_TOKENS to MAX_MODEL_LEN; before vLLM 0.14 that makes it rarer only."
    ),
    "part_proxy": "  proxy: HTTP port {}, registration port {}",
    "part_engine": "  {}: HTTP port {}, KV port {}, {}",
    "on_gpu": "GPU {}",
    "simulated": "simulated",
    "already_running": "Already running: {}. Requests go to {}; `stop` ends it.",
    "partly_running": "runs: {}; does not: {}. `restart NAME` brings a part back, `stop` ends everything.",
    "part_runs": "{} already runs (PID {}).",
    "waiting_for": "Waiting for {}, {} s",
    "wait_proxy": "the proxy",
    "wait_engine": "{} to answer",
    "wait_shared": "{} to be ready, {} shares its GPU",
    "wait_pairs": "the proxy to admit the engines",
    "wait_compile": "the build of the proxy's hot path",
    "part_died": "{} (PID {}) ended while it started",
    "part_ended": "{} ended with status {}",
    "start_timeout": "gave up waiting for {} after {} s (START_TIMEOUT)",
    "log_tail": "Last lines (at most {}) of {}:",
    "hint_memory": (
        "The GPU has too little free memory: look with nvidia-smi who uses it, or lower "
        "PREFILL_GPU_MEMORY_UTILIZATION, DECODE_GPU_MEMORY_UTILIZATION, MAX_MODEL_LEN or MAX_NUM_BATCHED_TOKENS."
    ),
    "hint_port": "A port was taken at the last moment; `doctor` shows by whom.",
    "hint_model": "MODEL={} was found neither as a folder nor at Hugging Face.",
    "hint_duplicate": "NCCL refuses a prefill and a decode engine on one GPU.",
    "interrupted": "Interrupted.",
    "rolling_back": "Stopping what was started: {}",
    "killing": "{} (process group {}) did not end within {} s after TERM: KILL",
    "all_ready": "Everything is ready: {}",
    "try_it": "Try it:",
    "watch_it": "Watch it work: {}/  (or `top` in a terminal)",
    "page_opened": "Opened in the browser.",
    "page_hint": (
        "Open it in a browser. From another machine: ssh -L {0}:{1} this-machine, then http://127.0.0.1:{0}/"
    ),
    "page_key": "The page asks for the key: it is API_KEY.",
    "top_installing": "`top` needs the package rich: installing it into {}; the log is {}",
    "top_no_rich": "`top` needs the package rich. Run: {} -m pip install -r requirements-top.txt",
    "next_commands": "Next: {} test, then status, logs, stop",
    "nothing_runs": "Nothing is running.",
    "not_running": "{} is not running",
    "stopped": "Stopped: {}",
    "stopped_decode": (
        "{0} is a decode engine: prefills that have sent to it must be restarted with it; `restart {0}` does that."
    ),
    "interrupting_all": "Another `all` (PID {}) is still starting; stopping it.",
    "restart_prefills": "{} sent KV to {} and would stay frozen: restarted too.",
    "in_foreground": "{} runs in a terminal of its own; stop it there with Ctrl+C",
    "restarted": "Restarted: {}",
    "foreground": "{} runs here, ports {}. Ctrl+C stops it.",
    "foreground_first": "This is {}; for the next one: {} 2, in another terminal.",
    "stopping": "Stopping {}",
    "no_proxy": "no proxy answers at {}. Start everything with `all`",
    "test_model": "model: {}",
    "test_times": "{} s, first chunk after {} s, {} tokens, {}",
    "test_problem": "{}: {}",
    "test_skipped": "{} was skipped: {}",
    "test_failed": "the test failed; see `status` and `logs`",
    "test_ok": "All requests were answered through a prefill and a decode engine.",
    "bench_simulated": (
        "No vLLM engines here: a small load of this script's own on what runs. Its figures say nothing about GPUs."
    ),
    "bench_sim_figures": "SIMULATED ENGINES: these figures say nothing about GPUs.",
    "bench_own_client": "The load generator is this project's own, not vllm bench serve; the report says so.",
    "bench_once_alone": "--once takes no other option",
    "bench_clocks_with": "--clocks does not go with --ratio; --traditional goes with --clocks only",
    "bench_clocks_short": "BENCH_SECONDS={}: a run over clocks takes at least {} s on real GPUs",
    "bench_clocks_gpus": "it is not known on which GPUs the engines run: start them with `all`",
    "bench_no_pair": "the proxy at {} has no prefill and decode ready; see `status`",
    "bench_too_long": "BENCH_INPUT_LEN={} and BENCH_OUTPUT_LEN={} are together more than MAX_MODEL_LEN={}",
    "bench_folder": "The report goes to {}; Ctrl+C ends it and keeps what was measured.",
    "bench_not_ours": (
        "what serves at {} was not started with `all`; --against-plain must be able to stop it and start it again"
    ),
    "bench_pool_small": "{} GPU(s) or engines to divide; two are needed at least",
    "bench_pool_twice": "GPU {} is named twice; this comparison needs each engine on GPUs of its own",
    "bench_setup": "Next setup: {} ({} of {})",
    "bench_restoring": "Starting again what ran before.",
    "bench_nothing": "nothing was measured; no report in {}",
    "no_log": 'there is no log of "{}" in {}',
    "no_logs": "there are no logs in {}",
    "env_secret": "set it first, it is not shown here",
    "env_sim": "These are simulated engines ({}). ENGINE=vllm prints the commands for vLLM.",
    "env_no_vllm": "No vLLM found here; the commands are those for {}.",
    "status_clocks": "holds the clocks of the GPUs",
    "power_set": "Clocks are set: {}. They are reset when this is stopped or dies.",
    "power_note": "Clocks: {}",
    "power_not_set": "Clocks and power limits are not set: {}",
    "power_see_log": "see {}",
    "power_reset": "Left by a guard that was killed: {}",
    "power_left": (
        "clocks that a killed guard has left could not be reset: {}. As root: nvidia-smi -rgc, or `disagg-proxy power "
        "reset`"
    ),
    "doc_clocks_unreadable": "clocks and power cannot be read: {}",
    "doc_clocks_state": "what a guard has left cannot be read: {}. Remove the file when `nvidia-smi -q` shows no lock",
    "doc_clocks_off": "clocks are not set: POWER_BACKEND=none",
    "doc_clocks_may": "clocks may be set by {}",
    "doc_clocks_denied": (
        "clocks may not be set: run as root, start zeusd, or let sudo run nvidia-smi without a password; all else "
        "works without"
    ),
    "doc_clock_range": "GPU {}: SM clocks {} to {} MHz, now {}",
    "doc_clock_no_range": "GPU {}: it lists no clocks that could be set",
    "doc_clock_locked": (
        "GPU {0}: its clocks are limited by a setting that is not this project's (applications_clocks_setting); as "
        "root: nvidia-smi -i {0} -rgc"
    ),
    "doc_clock_throttled": "GPU {}: throttled ({}): figures of this moment are not those of its clocks",
    "doc_clocks_set": "clocks of GPU {} are set by the guard (PID {})",
    "doc_clocks_left": "clocks of GPU {} were left by a guard that was killed: `stop` or `disagg-proxy power reset`",
    "status_watching": "watching",
    "status_pairs": "{} pair(s)",
    "status_silent": "does not answer",
    "status_loading": "loading",
    "status_bad": "its /health answers {}",
    "status_no_pair": "no request can be served: {}",
    "status_proxy_says": "proxy: {}; {} requests so far",
    "status_flying": "{}, {} in flight ({})",
    "status_unknown": "answers; the proxy does not know it",
    "status_no_key": "answers; what the proxy knows of it needs API_KEY",
    "key_missing": "the proxy at {} requires a key: set API_KEY, or CONFIG to the file that has it",
    "key_wrong": "the proxy at {} does not accept this API_KEY",
    "secret_not_given": (
        "what runs was started with {}, and keys are not kept on disk: set it again, or CONFIG to the file that has "
        "it; without it this part would start without a key"
    ),
    "status_restarts": "restarts: {}; last {}: {}",
    "status_given_up": "given up; see {}, then `restart`",
    "status_wanted": "`restart {}` brings it back",
    "status_wanted_terminal": "stop it in its terminal with Ctrl+C and start it again",
    "compiled_used": "The proxy's hot path is compiled.",
    "compiled_ready": "The proxy runs interpreted; its compiled hot path is ready: `{} restart proxy` uses it.",
    "compiled_later": (
        "The proxy runs interpreted; its hot path is being compiled at low priority, log {}. The next start, or "
        "`{} restart proxy`, uses it."
    ),
    "compiled_failed": (
        "The proxy runs interpreted: its hot path could not be compiled, see {}. PROXY_COMPILED=1 tries again, 0 "
        "removes this warning."
    ),
    "compiled_blocked": "The proxy runs interpreted; to compile its hot path: {}. PROXY_COMPILED=0 removes this line.",
    "compiled_cannot": "PROXY_COMPILED=1: the hot path cannot be compiled here: {}",
    "compiled_needed": "PROXY_COMPILED=1: the hot path could not be compiled; see {}",
    "compiled_no_sources": (
        "PROXY_COMPILED=1 needs a checkout, {} is none. For an installed package: DISAGG_PROXY_COMPILE=1 pip install"
    ),
    "build_compiler": "no C compiler `{}` (Debian: apt-get install gcc)",
    "build_header": "no {} (Debian: apt-get install python3-dev)",
    "build_venv": "no module venv (Debian: apt-get install python3-venv)",
    "build_folder": "{} cannot be written; XDG_CACHE_HOME names another folder",
    "compile_begins": "Compiling the hot path of {} for {}",
    "compile_done": "Compiled into {} in {} s",
    "compile_error": "the hot path could not be compiled: {}",
    "compile_ended": "The build was ended; the next start begins it anew.",
    "status_compiled": "compiled",
    "status_interpreted": "interpreted",
    "status_sim": "The engines are SIMULATED: no model runs.",
    "sup_watching": "watching: {}",
    "sup_ends": "the supervisor ends",
    "sup_died": "{} (PID {}) died; restart in {} s (death {}, limit {})",
    "sup_ended": "{} (PID {}) was ended; restart in {} s (death {}, limit {})",
    "sup_frozen": "{} (PID {}) is frozen, says the proxy ({}), and is ended",
    "sup_frozen_terminal": (
        "{} (PID {}) is frozen, says the proxy ({}), but runs in a terminal of its own: stop it there with "
        "Ctrl+C and start it again"
    ),
    "sup_partner": "{} (PID {}) has sent KV to {} and would stay frozen: restarted",
    "sup_partner_terminal": (
        "{} (PID {}) has sent KV to {} and would stay frozen, but runs in a terminal of its own: stop it there "
        "with Ctrl+C and start it again"
    ),
    "sup_given_up": "{} died or froze {} times within {} s: given up. The end of its log:",
    "sup_why_died": "PID {} died",
    "sup_why_froze": "PID {} was frozen: {}",
    "sup_why_partner": "it had sent KV to {}, which ended",
    "sup_why_loop": "gone {} times, at last: {}",
    "sup_port": "{} waits: port {} is {}",
    "sup_started": "{} started again, PID {}",
    "sup_failed": "cannot act now: {}; trying again",
    "sup_log_mark": "===== {} is started again by the supervisor =====",
    "doctor_ok": "ok",
    "doctor_warning": "warning",
    "doctor_error": "error",
    "doctor_bad": "{} error(s), {} warning(s)",
    "doctor_good": "No errors, {} warning(s).",
    "doc_python": "Python: {}, {}",
    "doc_packages": "the proxy's packages: in {}",
    "doc_packages_later": "not installed: {}; `all` installs them into {}",
    "doc_no_venv": "not installed: {}; and this Python cannot make a virtual environment. Run: {}",
    "doc_compiled_off": "compiled hot path: not used (PROXY_COMPILED=0, or no checkout)",
    "doc_compiled": "compiled hot path: {}",
    "doc_compiling": "compiled hot path: being built, log {}",
    "doc_compile_later": "compiled hot path: `all` builds it beside what runs, with {}",
    "doc_compile_index": (
        "compiled hot path: the package index does not answer, and mypy is needed from it; the proxy runs "
        "interpreted. Set PIP_INDEX_URL to a reachable index, or PROXY_COMPILED=0"
    ),
    "doc_sim_asked": "vLLM: not needed, ENGINE=sim",
    "doc_vllm": "vLLM {} with {}: {}",
    "doc_random_set": (
        "request ids: kept as they are (VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 is set for both engines)"
    ),
    "doc_random_zero": (
        "your environment sets VLLM_DISABLE_REQUEST_ID_RANDOMIZATION to something else than 1; this script sets "
        "1 for its engines, engines you start yourself would hang"
    ),
    "doc_random_none": "request ids: this vLLM does not randomise them",
    "doc_secret": "KV ports: engines and proxy prove that they know DISAGG_KV_SECRET",
    "doc_no_secret": (
        "KV ports are open on {} and DISAGG_KV_SECRET is not set: anyone who reaches them can request KV; set one"
    ),
    "doc_few_gpus": "{} GPU(s) shown by nvidia-smi: engines will be simulated",
    "doc_shared_gpu": (
        "GPU {} is for prefill and decode, with {} MiB of KV cache each: for trying, tests and development only"
    ),
    "doc_gpu": "GPU {}: {}, {} of {} MiB free",
    "doc_gpu_over": (
        "GPU {}: its engines take {} % of it together; lower PREFILL_GPU_MEMORY_UTILIZATION or "
        "DECODE_GPU_MEMORY_UTILIZATION"
    ),
    "doc_gpu_busy": (
        "GPU {}: {} MiB free, {} MiB wanted for {}; stop what uses it, or lower the GPU memory utilization"
    ),
    "doc_gpu_free": "GPU {}: {} MiB free, {} MiB wanted for {}",
    "doc_buffer": "KV buffer of {} on GPU {}: {} MiB beside vLLM's share, {} MiB wanted",
    "doc_buffer_big": (
        "KV buffer of {} on GPU {}: {} MiB beside vLLM's share, {} MiB wanted; lower KV_BUFFER_SIZE or "
        "DECODE_GPU_MEMORY_UTILIZATION"
    ),
    "doc_staging": "staging buffers of {} on GPU {}: {} MiB beside vLLM's share, {} MiB wanted",
    "doc_staging_big": (
        "staging buffers of {} on GPU {}: {} MiB beside vLLM's share, {} MiB wanted; lower GPU_MEMORY_UTILIZATION"
    ),
    "doc_link_nvlink": "{} to {}: NVLink ({})",
    "doc_link_pci": (
        "{} to {}: no NVLink, the way is {}; KV transfer is slower. Other GPUs may be closer: nvidia-smi topo -m"
    ),
    "doc_link_unknown": "{} to {}: nvidia-smi topo does not say how they are connected",
    "doc_peer": "{} to {}: peer access",
    "doc_no_peer": "{} to {}: no peer access ({}); KV goes through host memory",
    "doc_ports": "ports of {} are free: {}",
    "doc_model": "model: {} ({})",
    "doc_model_missing": "MODEL={} is not a readable folder with a config.json",
    "model_unsupported": "MODEL={} cannot be served by prefill and decode with this project's connector: {}",
    "doc_no_tokenizer": "MODEL={} has no tokenizer file",
    "doc_no_weights": "MODEL={} has no weights (*.safetensors, *.bin)",
    "doc_model_unused": "model: {}, only its name is used with simulated engines",
    "doc_model_cached": "model: {} is in {}",
    "doc_model_offline": "MODEL={} is not in {}, and HF_HUB_OFFLINE=1 forbids the download",
    "doc_model_disk": "MODEL={} must be downloaded, and there are only {} GiB free at {}",
    "doc_model_download": "MODEL={} will be downloaded at the first start; {} GiB free at {}",
    "doc_pool": "pinned host memory: {} GiB wanted, {} GiB available",
    "doc_pool_big": "pinned host memory: {} GiB wanted, only {} GiB available; lower MEM_POOL_SIZE_GB",
    "doc_disk": "disk for logs at {}: {} GiB free",
    "doc_log_disk": "less than 1 GiB free at {}; set LOG_DIR to another disk",
    "doc_files": "open files allowed: {}",
    "doc_files_low": "only {} open files allowed; many requests at once need more: ulimit -n 65536",
    "doc_shm": "/dev/shm has {} MiB free; tensor parallel needs about 1 GiB (docker: --shm-size 4g)",
    "doc_run_dir": "nothing stale in {}",
    "doc_stale_dead": "{}: its PID file names PID {}, which is gone, started {} min ago; `stop` clears it",
    "doc_stale_reused": (
        "{}: its PID file names PID {}, which now belongs to another process, started {} min ago; `stop` clears it "
        "and does not touch that process"
    ),
    "doc_clock": "{}: its PID file is from the future; the clock was set back",
    "doc_frozen": "{} is frozen, says the proxy: {}. `restart {}` brings it back",
    "doc_hung": "{} runs, but {}. `restart {}` brings it back",
    "doc_no_pair": "no request can be served: {}",
}
