"""Save adapters to files and load them. Every load is strict: a key that does not fit raises.

adapter_file   the format of this package: one safetensors file (`save_adapter`)
description    the JSON in the metadata of that file: options, sizes and names of the layers
originals      the key layouts of MOELoRA-peft and of MING-MOE: load them, export them
original_keys  the keys of these layouts for one model
folders        an adapter folder (adapter_config.json and adapter_model) without its base model,
               for `moelora_kernels.export`
files          read tensors from files and folders; the checks that all loads share
"""

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
