"""The flags of XLA with which the tests and their commands compile.

Each program runs a few times, so that what counts is how fast it is compiled.
"""

# The old emitters of fused operations: LLVM compiles their output in a third of the time.
COMPILE_FAST = "--xla_cpu_use_fusion_emitters=false"
# Of a program whose rounding is compared with another's: compile it with the usual emitters.
EXACT = {"xla_cpu_use_fusion_emitters": True}
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
