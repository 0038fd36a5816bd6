"""How files name layers: by number, or by the module whose output the numbers are."""

import re
from typing import NamedTuple

from whipstaff.steering.shape import Site

_COUNTED = re.compile(
    r"(?:(?:vec_|steering_)?(?:(?:layer|block)[_.\- ]?|(?:layers|blocks|l)[_\- ]?)|arr_)?(-?\d{1,4})", re.IGNORECASE
)
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.([a-z_][\w.]*))?|direction\.(\d{1,4})")
SITES_OF: dict[str, Site] = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "mlp": "mlp_out",
    "input_layernorm": "attn_in",
    "ln_1": "attn_in",
    "post_attention_layernorm": "mlp_in",
    "pre_feedforward_layernorm": "mlp_in",
    "ln_2": "mlp_in",
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_head",
}


class Key(NamedTuple):
    """What an entry's name says."""

    layer: int
    site: Site | None
    is_counted: bool  # and may count hidden states


def key_of(name: str) -> Key | None:
    """None where the name is no layer's."""
    if match := _COUNTED.fullmatch(name):
        return Key(int(match[1]), None, True)
    match = _MODULE.fullmatch(name)
    if match is None or (match[2] and match[2] not in SITES_OF):
        return None
    return Key(int(match[1] or match[3]), SITES_OF[match[2]] if match[2] else None, False)
