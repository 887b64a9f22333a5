# Completion of disagg-proxy and test_single_machine.sh for bash. Made by tools/completions.py: make tables
#
#   source completions/disagg-proxy.bash

_disagg_proxy() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} folder=. path='' choices='' index file
  if [[ $word == '=' ]]; then
    word=''
  elif [[ $before == '=' ]]; then
    before=${COMP_WORDS[COMP_CWORD - 2]}
  fi
  if [[ ${COMP_WORDS[0]##*/} == test_single_machine.sh ]]; then
    path=machine
    if [[ ${COMP_WORDS[0]} == */* ]]; then folder=${COMP_WORDS[0]%/*}; fi
  fi
  for ((index = 1; index < COMP_CWORD; index++)); do
    case "$path ${COMP_WORDS[index]}" in
      " serve" | " check" | " machine" | "machine menu" | "machine proxy" | "machine prefill" | "machine decode" | "machine all" | "machine test" | "machine status" | "machine logs" | "machine stop" | "machine restart" | "machine config" | "machine doctor" | "machine bench" | "machine env" | "machine page" | "machine top" | "machine power" | "machine help" | " cluster" | "cluster up" | "cluster check" | "cluster status" | "cluster scale" | "cluster drain" | "cluster undrain" | "cluster down" | " sim" | " top" | " key" | "key new" | " calibrate" | " bench" | "bench sweep" | "bench clocks" | "bench write" | "bench plots" | " power" | "power show" | "power record" | "power guard" | "power clocks" | "power reset" | "power hold" | " demo" | " chaos")
        path+=" ${COMP_WORDS[index]}"
        path=${path# }
        ;;
    esac
  done
  # The value of an option.
  case "${path:-serve} $before" in
    'serve --config' | 'serve --api-keys-file' | 'serve --kv-secret-file' | 'serve --power-status-file' | 'serve --access-log' | 'check --config' | 'check --api-keys-file' | 'check --kv-secret-file' | 'check --power-status-file' | 'check --access-log' | 'sim --profile' | 'sim --gpus-file' | 'calibrate --output' | 'calibrate -o' | 'bench clocks --run-dir' | 'power record --out' | 'power guard --state' | 'power clocks --state' | 'power reset --state' | 'power hold --run-dir' | 'chaos --json')
      _disagg_proxy_files && return
      ;;
    'serve --http-host' | 'serve --http-port' | 'serve --workers' | 'serve --zmq-host' | 'serve --zmq-port' | 'serve --prefill' | 'serve --decode' | 'serve --allow-register' | 'serve --instance-expiry' | 'serve --forward-registrations' | 'serve --power-gpus' | 'serve --probe-interval' | 'serve --connect-timeout' | 'serve --prefill-timeout' | 'serve --decode-timeout' | 'serve --freeze-after-min' | 'serve --freeze-after-max' | 'serve --body-timeout' | 'serve --header-timeout' | 'serve --send-timeout' | 'serve --shutdown-grace' | 'serve --max-body-bytes' | 'serve --max-header-bytes' | 'serve --max-tries' | 'serve --max-in-flight' | 'serve --prefill-max-in-flight' | 'serve --decode-max-in-flight' | 'serve --kv-buffer-bytes' | 'serve --kv-bytes-per-token' | 'serve --decode-alone-below' | 'serve --slo-ttft-ms' | 'serve --slo-tpot-ms' | 'serve --max-queue' | 'serve --queue-timeout' | 'serve --session-header' | 'serve --load-bound' | 'serve --api-key' | 'serve --engine-api-key' | 'serve --admin-key' | 'serve --kv-secret' | 'serve --cors-origins' | 'check --http-host' | 'check --http-port' | 'check --workers' | 'check --zmq-host' | 'check --zmq-port' | 'check --prefill' | 'check --decode' | 'check --allow-register' | 'check --instance-expiry' | 'check --forward-registrations' | 'check --power-gpus' | 'check --probe-interval' | 'check --connect-timeout' | 'check --prefill-timeout' | 'check --decode-timeout' | 'check --freeze-after-min' | 'check --freeze-after-max' | 'check --body-timeout' | 'check --header-timeout' | 'check --send-timeout' | 'check --shutdown-grace' | 'check --max-body-bytes' | 'check --max-header-bytes' | 'check --max-tries' | 'check --max-in-flight' | 'check --prefill-max-in-flight' | 'check --decode-max-in-flight' | 'check --kv-buffer-bytes' | 'check --kv-bytes-per-token' | 'check --decode-alone-below' | 'check --slo-ttft-ms' | 'check --slo-tpot-ms' | 'check --max-queue' | 'check --queue-timeout' | 'check --session-header' | 'check --load-bound' | 'check --api-key' | 'check --engine-api-key' | 'check --admin-key' | 'check --kv-secret' | 'check --cors-origins' | 'machine logs -n' | 'cluster --address' | 'cluster --name' | 'cluster drain --wait' | 'sim --host' | 'sim --port' | 'sim --kv-port' | 'sim --decode-port' | 'sim --decode-kv-port' | 'sim --proxy' | 'sim --ping-seconds' | 'sim --model' | 'sim --vllm-version' | 'sim --api-key' | 'sim --max-model-len' | 'sim --max-num-seqs' | 'sim --max-num-batched-tokens' | 'sim --startup-seconds' | 'sim --prefill-tokens-per-second' | 'sim --time-per-output-token' | 'sim --communicator-seconds' | 'sim --gpu' | 'sim --kv-secret' | 'sim --kv-block-size' | 'sim --load-timeout' | 'sim --hold-timeout' | 'sim --kv-bytes-per-token' | 'sim --kv-buffer-bytes' | 'sim --kv-pool-bytes' | 'sim --kv-wire-bytes-per-token' | 'sim --kv-layers' | 'sim --kv-cache-tokens' | 'sim --prefix-cache-blocks' | 'sim --exit-after-death-seconds' | 'top --url' | 'top --key' | 'calibrate --proxy' | 'calibrate --model' | 'calibrate --seconds' | 'bench sweep --url' | 'bench sweep --name' | 'bench sweep --title' | 'bench sweep --model' | 'bench sweep --tokenizer' | 'bench sweep --seconds' | 'bench sweep --patience' | 'bench sweep --warm-up' | 'bench sweep --input-len' | 'bench sweep --output-len' | 'bench sweep --gpus' | 'bench sweep --fact' | 'bench sweep --vllm' | 'bench sweep --vllm-version' | 'bench sweep --rates' | 'bench sweep --time-limit' | 'bench sweep --engines' | 'bench sweep --note' | 'bench sweep --slo-ttft-ms' | 'bench sweep --slo-tpot-ms' | 'bench sweep --slo-attainment' | 'bench clocks --url' | 'bench clocks --name' | 'bench clocks --title' | 'bench clocks --model' | 'bench clocks --tokenizer' | 'bench clocks --seconds' | 'bench clocks --patience' | 'bench clocks --warm-up' | 'bench clocks --input-len' | 'bench clocks --output-len' | 'bench clocks --gpus' | 'bench clocks --fact' | 'bench clocks --clocks' | 'bench clocks --rounds' | 'bench clocks --settle' | 'bench clocks --rate' | 'bench clocks --owner' | 'bench clocks --backend' | 'bench clocks --slo-ttft-ms' | 'bench clocks --slo-tpot-ms' | 'bench clocks --slo-attainment' | 'bench write --slo-ttft-ms' | 'bench write --slo-tpot-ms' | 'bench write --slo-attainment' | 'bench plots --slo-ttft-ms' | 'bench plots --slo-tpot-ms' | 'bench plots --slo-attainment' | 'power show --url' | 'power show --key' | 'power record --url' | 'power record --key' | 'power record --interval' | 'power record --seconds' | 'power record --gpus' | 'power guard --gpus' | 'power hold --owner' | 'power hold --metrics' | 'power hold --slo-ttft-ms' | 'power hold --slo-tpot-ms' | 'power hold --prefill-gpus' | 'power hold --prefill-sm' | 'power hold --prefill-memory' | 'power hold --prefill-power' | 'power hold --decode-gpus' | 'power hold --decode-sm' | 'power hold --decode-memory' | 'power hold --decode-power' | 'demo --seconds' | 'chaos --seconds' | 'chaos --seed' | 'chaos --prefills' | 'chaos --decodes' | 'chaos --rate' | 'chaos --trouble' | 'chaos --every' | 'chaos --kv-buffer-bytes')
      return
      ;;
    'serve --power-meter' | 'serve --decode-alone' | 'serve --enable-profiling' | 'serve --served-by-header' | 'serve --stream-error-event' | 'serve --traces' | 'check --power-meter' | 'check --decode-alone' | 'check --enable-profiling' | 'check --served-by-header' | 'check --stream-error-event' | 'check --traces')
      choices='0 1'
      ;;
    'serve --placement' | 'check --placement')
      choices='split elastic'
      ;;
    'serve --prefill-policy' | 'check --prefill-policy')
      choices='prefix_aware least_loaded power_of_two round_robin session'
      ;;
    'serve --decode-policy' | 'check --decode-policy')
      choices='joint least_loaded power_of_two round_robin session'
      ;;
    'serve --roles' | 'check --roles')
      choices='placement auto announced'
      ;;
    'serve --log-level' | 'check --log-level' | 'chaos --log-level')
      choices='debug info warning error'
      ;;
    'serve --log-format' | 'check --log-format')
      choices='text json'
      ;;
    'sim --role')
      choices='prefill decode pair'
      ;;
    'sim --connector')
      choices='p2p_nccl disagg_kv nixl moriio'
      ;;
    'sim --close-after-400')
      choices='close reset keep'
      ;;
    'sim --log-level')
      choices='DEBUG INFO WARNING ERROR'
      ;;
    'bench sweep --kind' | 'bench clocks --kind')
      choices='pd plain elastic'
      ;;
    'bench sweep --question')
      choices='sweep ratio'
      ;;
    'bench sweep --client')
      choices='own vllm'
      ;;
    'power guard --backend' | 'power hold --backend')
      choices='auto nvml zeusd sudo none'
      ;;
    'power hold --governor')
      choices='off slo'
      ;;
    *)
      case $path in
        '')
          choices='serve check machine cluster sim top key calibrate bench power demo chaos -h --help --version --config --http-host --http-port --workers --zmq-host --zmq-port --prefill --decode --allow-register --instance-expiry --forward-registrations --power-meter --power-gpus --probe-interval --connect-timeout --prefill-timeout --decode-timeout --freeze-after-min --freeze-after-max --body-timeout --header-timeout --send-timeout --shutdown-grace --max-body-bytes --max-header-bytes --max-tries --max-in-flight --prefill-max-in-flight --decode-max-in-flight --kv-buffer-bytes --kv-bytes-per-token --decode-alone --decode-alone-below --placement --slo-ttft-ms --slo-tpot-ms --max-queue --queue-timeout --prefill-policy --decode-policy --roles --session-header --load-bound --api-key --api-keys-file --engine-api-key --admin-key --kv-secret --kv-secret-file --cors-origins --enable-profiling --served-by-header --stream-error-event --log-level --log-format --power-status-file --access-log --traces'
          ;;
        'serve' | 'check')
          choices='-h --help --version --config --http-host --http-port --workers --zmq-host --zmq-port --prefill --decode --allow-register --instance-expiry --forward-registrations --power-meter --power-gpus --probe-interval --connect-timeout --prefill-timeout --decode-timeout --freeze-after-min --freeze-after-max --body-timeout --header-timeout --send-timeout --shutdown-grace --max-body-bytes --max-header-bytes --max-tries --max-in-flight --prefill-max-in-flight --decode-max-in-flight --kv-buffer-bytes --kv-bytes-per-token --decode-alone --decode-alone-below --placement --slo-ttft-ms --slo-tpot-ms --max-queue --queue-timeout --prefill-policy --decode-policy --roles --session-header --load-bound --api-key --api-keys-file --engine-api-key --admin-key --kv-secret --kv-secret-file --cors-origins --enable-profiling --served-by-header --stream-error-event --log-level --log-format --power-status-file --access-log --traces'
          ;;
        'machine')
          choices='menu proxy prefill decode all test status logs stop restart config doctor bench env page top power help'
          ;;
        'machine menu' | 'machine proxy' | 'machine prefill' | 'machine decode' | 'machine test' | 'machine status' | 'machine doctor' | 'machine env' | 'machine page' | 'machine power' | 'machine help')
          choices=''
          ;;
        'machine all')
          choices='--supervise --no-supervise --foreground'
          ;;
        'machine logs')
          choices='proxy prefill decode supervisor -f -n'
          ;;
        'machine stop' | 'machine restart')
          choices='proxy prefill decode'
          ;;
        'machine config')
          choices='en zh --markdown'
          ;;
        'machine bench')
          choices='--ratio --clocks --against-plain --traditional --once'
          ;;
        'machine top')
          choices='--once'
          ;;
        'cluster')
          choices='up check status scale drain undrain down -h --help --address --name'
          ;;
        'cluster up')
          choices='-h --help --no-wait'
          ;;
        'cluster check' | 'cluster status' | 'cluster scale' | 'cluster undrain' | 'cluster down' | 'key new')
          choices='-h --help'
          ;;
        'cluster drain')
          choices='-h --help --wait'
          ;;
        'sim')
          choices='-h --help --role --host --port --kv-port --decode-port --decode-kv-port --proxy --ping-seconds --model --vllm-version --api-key --max-model-len --max-num-seqs --max-num-batched-tokens --enable-prompt-tokens-details --enable-request-id-headers --disable-auto-tool-choice --startup-seconds --prefill-tokens-per-second --time-per-output-token --profile --communicator-seconds --gpu --gpus-file --connector --kv-both --read-mode --kv-secret --kv-block-size --load-timeout --hold-timeout --kv-bytes-per-token --kv-buffer-bytes --kv-pool-bytes --kv-wire-bytes-per-token --kv-layers --kv-cache-tokens --prefix-cache-blocks --close-after-400 --exit-after-death-seconds --randomize-request-ids --log-level'
          ;;
        'top' | 'power show')
          choices='-h --help --url --key --once'
          ;;
        'key')
          choices='new -h --help'
          ;;
        'calibrate')
          choices='-h --help --proxy --output -o --model --seconds'
          ;;
        'bench')
          choices='sweep clocks write plots -h --help'
          ;;
        'bench sweep')
          choices='-h --help --url --name --title --kind --model --tokenizer --seconds --patience --warm-up --input-len --output-len --gpus --fact --simulated --question --client --vllm --vllm-version --rates --time-limit --engines --note --slo-ttft-ms --slo-tpot-ms --slo-attainment'
          ;;
        'bench clocks')
          choices='-h --help --url --name --title --kind --model --tokenizer --seconds --patience --warm-up --input-len --output-len --gpus --fact --simulated --clocks --rounds --settle --rate --together --run-dir --owner --backend --take-over --slo-ttft-ms --slo-tpot-ms --slo-attainment'
          ;;
        'bench write' | 'bench plots')
          choices='-h --help --slo-ttft-ms --slo-tpot-ms --slo-attainment'
          ;;
        'power')
          choices='show record guard clocks reset hold -h --help'
          ;;
        'power record')
          choices='-h --help --url --key --out --interval --seconds --gpus --no-proxy --no-plot'
          ;;
        'power guard')
          choices='-h --help --gpus --backend --take-over --state'
          ;;
        'power clocks')
          choices='-h --help --json --state'
          ;;
        'power reset')
          choices='-h --help --state'
          ;;
        'power hold')
          choices='-h --help --run-dir --backend --take-over --owner --governor --metrics --slo-ttft-ms --slo-tpot-ms --prefill-gpus --prefill-sm --prefill-memory --prefill-power --decode-gpus --decode-sm --decode-memory --decode-power'
          ;;
        'demo')
          choices='-h --help --seconds'
          ;;
        'chaos')
          choices='-h --help --seconds --seed --prefills --decodes --rate --trouble --every --no-supervisor --kv-buffer-bytes --json --show-plan --log-level'
          ;;
      esac
      ;;
  esac
  case $path in
    'bench sweep' | 'bench clocks' | 'bench write' | 'bench plots')
      if [[ $word != -* ]]; then _disagg_proxy_files && return; fi
      ;;
  esac
  # What runs now, when it is where it is by default.
  case $path in
    'machine logs' | 'machine stop' | 'machine restart')
      for file in "${RUN_DIR:-$folder/run}"/*.pid; do
        file=${file##*/}
        if [[ $file == *[0-9].pid ]]; then choices+=" ${file%.pid}"; fi
      done
      ;;
  esac
  COMPREPLY=()
  while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -W "$choices" -- "$word")
}

_disagg_proxy_files() {
  compopt -o filenames 2>/dev/null
  COMPREPLY=()
  while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -f -- "$word")
}

complete -F _disagg_proxy disagg-proxy test_single_machine.sh ./test_single_machine.sh
