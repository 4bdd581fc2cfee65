"""Run a program with HTCondor's bindings, configured by the environment, which were imported with another one."""

import runpy
import sys

import htcondor2

htcondor2.reload_config()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
