"""The table of decoding methods, in the order in which they run within their stage. Adding one is a file here and a
line below."""

from typing import Any

from whipstaff.decoding.method import Method
from whipstaff.decoding.methods.adapter_free_ensemble import AdapterFreeEnsemble
from whipstaff.decoding.methods.adaptive_temperature import AdaptiveTemperature
from whipstaff.decoding.methods.co_llm import CoLlm
from whipstaff.decoding.methods.contrastive import Contrastive
from whipstaff.decoding.methods.contrastive_beta import ContrastiveBeta
from whipstaff.decoding.methods.dexperts import DExperts
from whipstaff.decoding.methods.dola import Dola
from whipstaff.decoding.methods.dry import Dry
from whipstaff.decoding.methods.dynatemp import Dynatemp
from whipstaff.decoding.methods.edt import Edt
from whipstaff.decoding.methods.epsilon_cutoff import EpsilonCutoff
from whipstaff.decoding.methods.eta_cutoff import EtaCutoff
from whipstaff.decoding.methods.kwd import Kwd
from whipstaff.decoding.methods.mirostat import Mirostat
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning
from whipstaff.decoding.methods.rule_adapter import RuleAdapter
from whipstaff.decoding.methods.top_a import TopA
from whipstaff.decoding.methods.top_n_sigma import TopNSigma
from whipstaff.decoding.methods.typical_p import TypicalP
from whipstaff.decoding.methods.xtc import Xtc

_TABLE: tuple[Method[Any], ...] = (
    ProxyTuning(),
    DExperts(),
    Contrastive(),
    ContrastiveBeta(),
    AdapterFreeEnsemble(),
    Dola(),
    CoLlm(),
    Kwd(),
    RuleAdapter(),
    Dry(),
    AdaptiveTemperature(),
    Edt(),
    Dynatemp(),
    TopNSigma(),
    TypicalP(),
    TopA(),
    EpsilonCutoff(),
    EtaCutoff(),
    Xtc(),
    Mirostat(),
)

METHODS: dict[str, Method[Any]] = {method.name: method for method in _TABLE}
