"""The GPU code of fused operations, in Triton. Imports triton: to be imported where it runs, and not before."""
