"""The table of decoding methods, in the order in which they run within their stage. Adding one is a file here, or in
`decoding/search/` for one that searches, and a line below."""

from typing import Any

from whipstaff.decoding.method import Method
from whipstaff.decoding.methods.adapter_ensemble import AdapterEnsemble
from whipstaff.decoding.methods.adapter_free_ensemble import AdapterFreeEnsemble
from whipstaff.decoding.methods.adaptive_temperature import AdaptiveTemperature
from whipstaff.decoding.methods.best_of import BestOf
from whipstaff.decoding.methods.cad import Cad
from whipstaff.decoding.methods.cfg import Cfg
from whipstaff.decoding.methods.co_llm import CoLlm
from whipstaff.decoding.methods.contrastive import Contrastive
from whipstaff.decoding.methods.contrastive_beta import ContrastiveBeta
from whipstaff.decoding.methods.contrastive_search import ContrastiveSearch
from whipstaff.decoding.methods.dexperts import DExperts
from whipstaff.decoding.methods.dola import Dola
from whipstaff.decoding.methods.dry import Dry
from whipstaff.decoding.methods.dynatemp import Dynatemp
from whipstaff.decoding.methods.edt import Edt
from whipstaff.decoding.methods.epsilon_cutoff import EpsilonCutoff
from whipstaff.decoding.methods.eta_cutoff import EtaCutoff
from whipstaff.decoding.methods.forced import Forced
from whipstaff.decoding.methods.instructive import Instructive
from whipstaff.decoding.methods.kwd import Kwd
from whipstaff.decoding.methods.mirostat import Mirostat
from whipstaff.decoding.methods.opera_lite import OperaLite
from whipstaff.decoding.methods.prompt_ensemble import PromptEnsemble
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning
from whipstaff.decoding.methods.rule_adapter import RuleAdapter
from whipstaff.decoding.methods.sh2 import Sh2
from whipstaff.decoding.methods.streams import Streams
from whipstaff.decoding.methods.top_a import TopA
from whipstaff.decoding.methods.top_n_sigma import TopNSigma
from whipstaff.decoding.methods.typical_p import TypicalP
from whipstaff.decoding.methods.xtc import Xtc
from whipstaff.decoding.search.beam_search import BeamSearch
from whipstaff.decoding.search.kcts import Kcts
from whipstaff.decoding.search.opera import Opera

_TABLE: tuple[Method[Any], ...] = (
    ProxyTuning(),
    DExperts(),
    Contrastive(),
    ContrastiveBeta(),
    AdapterFreeEnsemble(),
    Cfg(),
    Cad(),
    Sh2(),
    Instructive(),
    PromptEnsemble(),
    AdapterEnsemble(),
    Streams(),
    Dola(),
    CoLlm(),
    Kwd(),
    RuleAdapter(),
    BestOf(),
    Dry(),
    OperaLite(),
    ContrastiveSearch(),
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
    Forced(),
    BeamSearch(),
    Opera(),
    Kcts(),
)

METHODS: dict[str, Method[Any]] = {method.name: method for method in _TABLE}
