"""A GGUF file once more with its matrices stored in another way, so that a peer computes at our precision.

All that is not a matrix, and every word about the model, stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

FILE_TYPES = {
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0
}  # fmt: skip
ARCHITECTURE, FILE_TYPE = gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE


def copy_as(source: Path, target: Path, kind: GGMLQuantizationType) -> Path:
    """Write ``target``: matrices as ``kind``, one of `FILE_TYPES`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields[ARCHITECTURE].contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in (ARCHITECTURE, FILE_TYPE):
            continue
        is_array = entry.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if is_array else None)
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:  # norms
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            numbers = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
