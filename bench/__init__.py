"""The harness: throughput, memory and parity of converted models and of their parts, beside what they replace.

python -m bench.models --help           whole models: contenders interleaved in one run, a table and JSON records
python -m bench.report --help           those records as a picture and a Markdown page
python -m bench.demo --help             the main job on photographs: convert, check every gradient, measure, report
python -m bench.sweep --help            many models at many sizes against eager
python -m bench.roofline --help         primitive by primitive against the machine's limits
python -m bench.cross_compile --help    how the Triton kernels compile, without a GPU
python -m bench.studies --help          why skip connections work: the papers' claims, run on the fused blocks
python -m bench.host --help             what a step costs the host, without a GPU
python -m bench.gpu --help              everything that needs a GPU, in one command
pytest bench/                           single blocks and primitives
"""

import os

# PyTorch's profiler, which measures the peak memory, announces every start on stderr; read when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
