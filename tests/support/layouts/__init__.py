"""The layouts of original checkpoints, each a module with the same names."""

from support.layouts import ming, moelora_peft

LAYOUTS = {"ming": ming, "moelora_peft": moelora_peft}
