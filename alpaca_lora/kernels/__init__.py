"""Pure functions on tensors; no nn.Module, no knowledge of models or data.

`reference` is each op in plain torch, the definition and the fallback. A file of the op's own name holds its fast path.
"""
