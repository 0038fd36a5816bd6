"""The table of steering methods. Adding one is a file here and a line below."""

from typing import Any

from whipstaff.steering.method import Method
from whipstaff.steering.methods.actadd import ActAdd
from whipstaff.steering.methods.added import CAA, ControlVector, FunctionVector, ShiftVector
from whipstaff.steering.methods.angular import Angular
from whipstaff.steering.methods.attention import AttentionOverride, Pasta
from whipstaff.steering.methods.context_knob import ContextKnob
from whipstaff.steering.methods.direction import AddDirection, DirectionalAblation, DirectionalPatch
from whipstaff.steering.methods.head_scale import HeadScale
from whipstaff.steering.methods.iti import ITI
from whipstaff.steering.methods.learned_heads import (
    AdapterCentres,
    DeferHead,
    PrefixClassifier,
    TemperatureHead,
    TokenClassifier,
)
from whipstaff.steering.methods.lofit import LoFiT
from whipstaff.steering.methods.mote import MoTE
from whipstaff.steering.methods.probe import Probe
from whipstaff.steering.methods.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from whipstaff.steering.methods.repe import RepE
from whipstaff.steering.methods.sae import SAE, LFSteering
from whipstaff.steering.methods.side_attention import SideAttention
from whipstaff.steering.methods.soft_injection import SITE
from whipstaff.steering.methods.tarot import TaRot
from whipstaff.steering.methods.task_vector import TaskVector
from whipstaff.steering.methods.vector import GenericVector
from whipstaff.steering.methods.virtual_tokens import PrefixKV, SoftPrompt

METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        GenericVector(),
        CAA(),
        ActAdd(),
        RepE(),
        ControlVector(),
        ShiftVector(),
        FunctionVector(),
        TaskVector(),
        ITI(),
        LoFiT(),
        SITE(),
        HeadScale(),
        TaRot(),
        DirectionalAblation(),
        AddDirection(),
        DirectionalPatch(),
        ContextKnob(),
        Angular(),
        LoReFT(),
        NoReFT(),
        ConsReFT(),
        LobiReFT(),
        DiReFT(),
        NodiReFT(),
        SAE(),
        LFSteering(),
        MoTE(),
        Probe(),
        SoftPrompt(),
        PrefixKV(),
        SideAttention(),
        AttentionOverride(),
        Pasta(),
        DeferHead(),
        TemperatureHead(),
        TokenClassifier(),
        AdapterCentres(),
        PrefixClassifier(),
    )
}
