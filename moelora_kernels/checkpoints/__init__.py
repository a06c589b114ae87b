"""Adapters on disk, all of them strict: our own file, and the layouts of MOELoRA-peft and MING."""

from moelora_kernels.checkpoints.adapter_file import (
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from moelora_kernels.checkpoints.originals import (
    export_ming,
    export_moelora_peft,
    load_ming,
    load_moelora_peft,
)

__all__ = [
    "adapter_state_dict",
    "export_ming",
    "export_moelora_peft",
    "load_adapter",
    "load_adapter_state_dict",
    "load_ming",
    "load_moelora_peft",
    "save_adapter",
]
