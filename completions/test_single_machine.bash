# Completion for test_single_machine.sh:  source completions/test_single_machine.bash
# In zsh before it:  autoload -Uz compinit bashcompinit && compinit && bashcompinit
# So only what both shells have; zsh has no mapfile.

_test_single_machine() {
  local commands='menu proxy prefill decode all test status logs stop restart config doctor bench env page top help'
  local word=${COMP_WORDS[COMP_CWORD]} choices='' file
  if ((COMP_CWORD == 1)); then
    choices=$commands
  else
    case ${COMP_WORDS[1]} in
      all) choices='--supervise --no-supervise' ;;
      bench) choices='--ratio --against-plain --once' ;;
      top) choices='--once' ;;
      config) choices='--markdown en zh' ;;
      logs | stop | restart)
        choices='proxy prefill decode'
        if [[ ${COMP_WORDS[1]} == logs ]]; then choices+=' supervisor -f -n'; fi
        # What runs now, when it is where it is by default.
        for file in "${RUN_DIR:-$(dirname -- "${COMP_WORDS[0]}")/run}"/*.pid; do
          file=${file##*/}
          if [[ $file == *[0-9].pid ]]; then choices+=" ${file%.pid}"; fi
        done
        ;;
    esac
  fi
  COMPREPLY=()
  while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -W "$choices" -- "$word")
}

complete -F _test_single_machine test_single_machine.sh ./test_single_machine.sh
