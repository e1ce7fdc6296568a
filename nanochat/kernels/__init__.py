"""Fused operations, one package an operation, each beside a plain PyTorch twin that defines it.

    <operation>/__init__.py   the contract, the twin, and the choice of the implementation
    <operation>/triton.py     kernels for GPUs, where the operation has any
    <operation>/cpu.py        kernels for CPUs, where the Rust crate cpukernels has any for the operation
    dispatch.py               finds the kernel for given tensors, and registers torch operators
    cpu.py                    what the cpu.py files share

A public function takes the same arguments on every device: it asks `dispatch.fused` for a kernel and runs plain PyTorch
where there is none. Importing an operation imports neither Triton nor torch's compiler, so that commands start fast.

Shape letters: B batch, T time, E width, H heads, D head width, K taps, V vocabulary; here also G key/value heads,
S key positions, N rows or tokens. "Heads" means query heads where there are two kinds; H is a multiple of G.
"""
