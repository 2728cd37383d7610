"""What happens in a training step beside the optimizer's own update, one `Rule` each."""

from .frobenius_decay import FrobeniusDecay
from .imposed_norms import ImposeNorms, RecordNorms
from .log_factorizations import LogFactorizations
from .loss_so_far import LossSoFar
from .rank_adaptation import RankAdaptation
from .rule import Rule

__all__ = ["FrobeniusDecay", "ImposeNorms", "LogFactorizations", "LossSoFar", "RankAdaptation", "RecordNorms", "Rule"]
