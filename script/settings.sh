# shellcheck shell=bash
# Reading the settings: environment, then the CONFIG file, then what runs now, then the default.
# Every setting ends up as a shell variable of its name; SETTING_SOURCE says where it came from.

SETTING_NAMES=()
declare -A SETTING_KIND=() SETTING_DEFAULT=() SETTING_HELP=() SETTING_SOURCE=()

settings_init() {
  local name kind default en zh
  while IFS='|' read -r name kind default en zh; do
    SETTING_NAMES+=("$name")
    SETTING_KIND[$name]=$kind
    SETTING_DEFAULT[$name]=$default
    if [[ $UI_LANGUAGE == zh ]]; then SETTING_HELP[$name]=$zh; else SETTING_HELP[$name]=$en; fi
  done <<<"$SETTINGS_TABLE"
}

setting_known() {
  [[ -n ${SETTING_KIND[$1]:-} ]]
}

setting_put() {
  printf -v "$1" '%s' "$2"
  SETTING_SOURCE[$1]=$3
}

# An absolute path, seen from where the user stands.
absolute_path() {
  case $1 in
    /*) printf '%s' "$1" ;;
    '~/'*) printf '%s' "$HOME/${1:2}" ;;
    *) printf '%s' "$INVOKED_FROM/$1" ;;
  esac
}

load_settings() {
  local name
  for name in "${SETTING_NAMES[@]}"; do
    if [[ -n ${!name:-} ]]; then setting_put "$name" "${!name}" environment; else setting_put "$name" '' default; fi
  done
  if [[ -n $CONFIG ]]; then
    CONFIG=$(absolute_path "$CONFIG")
    read_config_file "$CONFIG"
  fi
  if [[ ${SETTING_SOURCE[RUN_DIR]} == default ]]; then RUN_DIR=$ROOT/run; else RUN_DIR=$(absolute_path "$RUN_DIR"); fi
  read_running_settings
  apply_defaults
  check_settings
  readonly "${SETTING_NAMES[@]}"
}

# NAME=value lines; `export` before and quotes around are allowed; nothing in the file is run.
read_config_file() {
  local file=$1 line name value number=0
  [[ -r $file && ! -d $file ]] || die 2 config_unreadable "$file"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    line=${line#"${line%%[![:space:]]*}"}
    [[ -n $line && $line != '#'* ]] || continue
    [[ $line =~ ^(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)[[:space:]]*=(.*)$ ]] ||
      die 2 config_bad_line "$file" "$number"
    name=${BASH_REMATCH[2]}
    value=$(unquote "${BASH_REMATCH[3]}")
    if ! setting_known "$name"; then
      [[ -v $name ]] || export "$name=$value"
      say config_passed_on "$name" "$file"
    elif [[ ${SETTING_SOURCE[$name]} == default ]]; then
      setting_put "$name" "$value" file
    fi
  done <"$file"
}

unquote() {
  local value=$1
  value=${value#"${value%%[![:space:]]*}"}
  value=${value%"${value##*[![:space:]]}"}
  if [[ $value =~ ^\"(.*)\"([[:space:]]+#.*)?$ || $value =~ ^\'(.*)\'([[:space:]]+#.*)?$ ]]; then
    value=${BASH_REMATCH[1]}
  else
    value=${value%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
  fi
  printf '%s' "$value"
}

# While something runs, the other commands speak of what runs.
read_running_settings() {
  local line name
  [[ -r $RUN_DIR/settings && -O $RUN_DIR/settings ]] || return 0
  anything_alive || return 0
  while IFS= read -r line; do
    name=${line%%=*}
    if setting_known "$name" && [[ ${SETTING_SOURCE[$name]} == default ]]; then
      setting_put "$name" "${line#*=}" running
    fi
  done <"$RUN_DIR/settings"
}

# Secrets are not written to disk.
write_running_settings() {
  local name
  for name in "${SETTING_NAMES[@]}"; do
    case $name in CONFIG | RUN_DIR | PYTHON | VENV_DIR) continue ;; esac
    if [[ ${SETTING_KIND[$name]} != secret ]]; then printf '%s=%s\n' "$name" "${!name}"; fi
  done >"$RUN_DIR/settings"
}

# Copies of the default model, taken instead of a download where one exists.
LOCAL_MODELS=(/share-data/wzk-1/model/Qwen3-4B)

default_model() {
  local folder
  for folder in "${LOCAL_MODELS[@]}"; do
    if [[ -e $folder ]]; then
      printf '%s' "$folder"
      return
    fi
  done
  printf '%s' "${SETTING_DEFAULT[MODEL]}"
}

apply_defaults() {
  local name visible=() both=${GPU_MEMORY_UTILIZATION}
  if [[ -z $MODEL ]]; then
    MODEL=$(default_model)
  elif [[ -d $(absolute_path "$MODEL") ]]; then
    MODEL=$(absolute_path "$MODEL")
  fi
  for name in "${SETTING_NAMES[@]}"; do
    if [[ -z ${!name} && ${SETTING_DEFAULT[$name]} != @ ]]; then printf -v "$name" '%s' "${SETTING_DEFAULT[$name]}"; fi
  done
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
  if [[ -z $PREFILL_GPU ]]; then PREFILL_GPU=${visible[0]:-0}; fi
  if [[ -z $DECODE_GPU && $TENSOR_PARALLEL =~ ^[0-9]{1,3}$ ]]; then
    DECODE_GPU=${visible[TENSOR_PARALLEL]:-}
    if [[ -z $DECODE_GPU ]]; then
      if [[ $PREFILL_GPU =~ ^[0-9]+$ ]]; then DECODE_GPU=$((PREFILL_GPU + TENSOR_PARALLEL)); else DECODE_GPU=1; fi
    fi
  fi
  : "${PREFILL_GPU_MEMORY_UTILIZATION:=${both:-0.9}}" "${DECODE_GPU_MEMORY_UTILIZATION:=$both}"
  if [[ -z $MAX_NUM_BATCHED_TOKENS && $MAX_MODEL_LEN =~ ^[0-9]{1,9}$ ]]; then
    MAX_NUM_BATCHED_TOKENS=$((MAX_MODEL_LEN > 8192 ? MAX_MODEL_LEN : 8192))
  fi
  if [[ -z $LOG_DIR && ${SETTING_SOURCE[RUN_DIR]} == default ]]; then LOG_DIR=$ROOT/logs; fi
  LOG_DIR=$(absolute_path "${LOG_DIR:-$RUN_DIR/logs}")
  REPORT_DIR=$(absolute_path "${REPORT_DIR:-$ROOT/reports}")
  VENV_DIR=$(absolute_path "${VENV_DIR:-$ROOT/.venv}")
  PYTHON=${PYTHON:-python3}
  if [[ $PYTHON == */* ]]; then PYTHON=$(absolute_path "$PYTHON"); fi
}

check_settings() {
  local name value kind
  for name in "${SETTING_NAMES[@]}"; do
    value=${!name} kind=${SETTING_KIND[$name]}
    [[ $value != *$'\n'* ]] || die 2 bad_setting "$name" '...' "$(text want_one_line)"
    [[ -n $value ]] || continue
    case $kind in
      port) [[ $value =~ ^[1-9][0-9]{0,4}$ ]] && ((value < 65536)) || die 2 bad_setting "$name" "$value" "$(text want_port)" ;;
      count) [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || die 2 bad_setting "$name" "$value" "$(text want_count)" ;;
      number) [[ $value =~ ^[0-9]+(\.[0-9]+)?([eE][+]?[0-9]{1,2})?$ ]] || die 2 bad_setting "$name" "$value" "$(text want_number)" ;;
      fraction) [[ $value =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] || die 2 bad_setting "$name" "$value" "$(text want_fraction)" ;;
      flag) [[ $value == [01] ]] || die 2 bad_setting "$name" "$value" "$(text want_flag)" ;;
      choice:*) [[ ",${kind#choice:}," == *",$value,"* ]] || die 2 bad_setting "$name" "$value" "$(text want_choice "${kind#choice:}")" ;;
      host) [[ $value =~ ^[A-Za-z0-9._:-]+$ ]] || die 2 bad_setting "$name" "$value" "$(text want_host)" ;;
      gpu) [[ $value =~ ^[A-Za-z0-9-]+(\+[A-Za-z0-9-]+)*$ ]] || die 2 bad_setting "$name" "$value" "$(text want_gpu)" ;;
      gpus) [[ $value =~ ^[A-Za-z0-9-]+([+,][A-Za-z0-9-]+)*$ ]] || die 2 bad_setting "$name" "$value" "$(text want_gpus)" ;;
      rates) [[ $value =~ ^[0-9.]+([[:space:],]+[0-9.]+)*$ && ! $value =~ (^|[[:space:],])[0.]+([[:space:],]|$) ]] || die 2 bad_setting "$name" "$value" "$(text want_rates)" ;;
      word) [[ $value =~ ^[A-Za-z0-9_.-]+$ ]] || die 2 bad_setting "$name" "$value" "$(text want_word)" ;;
      names) [[ $value =~ ^[^,[:space:]]+(,[^,[:space:]]+)*$ ]] || die 2 bad_setting "$name" "$value" "$(text want_names)" ;;
    esac
  done
}

# A number without its fraction, whatever the locale's decimal point is. Going back to a locale that is not
# installed makes bash complain each time.
whole() {
  { LC_ALL=C printf '%.0f' "$1"; } 2>/dev/null
}

setting_shown() {
  if [[ ${SETTING_KIND[$1]} == secret && -n ${!1} ]]; then printf '********'; else printf '%s' "${!1}"; fi
}

cmd_config() {
  local name
  case ${1:-} in
    '') ;;
    --markdown)
      settings_markdown "${2:-$UI_LANGUAGE}"
      return
      ;;
    *) die 2 unknown_argument config "$1" ;;
  esac
  for name in "${SETTING_NAMES[@]}"; do
    printf '%-32s %-44s %s\n' "$name" "$(setting_shown "$name")" "$(text "source_${SETTING_SOURCE[$name]}")"
  done
}

settings_markdown() {
  local name kind default en zh
  case $1 in
    en) printf '%s\n' '| Setting | Default | Meaning |' '|---|---|---|' ;;
    zh) printf '%s\n' '| 设置 | 默认值 | 含义 |' '|---|---|---|' ;;
    *) die 2 unknown_argument 'config --markdown' "$1" ;;
  esac
  while IFS='|' read -r name kind default en zh; do
    if [[ $default == @ ]]; then default=''; fi
    if [[ $1 == zh ]]; then en=$zh; fi
    printf '| `%s` | %s | %s |\n' "$name" "${default:+\`$default\`}" "$en"
  done <<<"$SETTINGS_TABLE"
}
