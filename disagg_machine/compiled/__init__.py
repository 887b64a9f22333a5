"""The proxy's hot path as native code, built beside a running machine and used by the next start. From the bottom up:

identity    what a build is bound to: the content of the sources, the recipe, and the Python
store       the folder of builds: which one may be used, which failed, which are old
build       the process that builds: a copy of the sources, the compiler's environment, one trial, one rename
control     what the commands do: which proxy to start, begin a build, wait for one, end it
"""
