"""What native code for this Python depends on, as JSON (disagg_machine/compiled/identity.py). Standard library only."""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig

# As setuptools chooses it.
compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
text = [
    sys.version,
    sys.implementation.name,
    sysconfig.get_config_var("EXT_SUFFIX"),
    sysconfig.get_platform(),
    *platform.libc_ver(),
]
print(
    json.dumps(
        {
            "text": "\n".join(map(str, text)),
            "compiler": compiler,
            "has_compiler": shutil.which(compiler) is not None,
            "header": header,
            "has_header": os.path.exists(header),
            "can_make_venv": None not in (importlib.util.find_spec("ensurepip"), importlib.util.find_spec("venv")),
        }
    )
)
