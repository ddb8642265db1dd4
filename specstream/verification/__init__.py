"""Rules of acceptance: pure functions of a draft, the target's laws and uniform numbers."""

from specstream.verification.base import TokenVerifier
from specstream.verification.masked import (
    CanvasVerifier,
    ConfidenceThreshold,
    DisagreementWithConfidence,
    ExactMatch,
    KeepOrRemask,
    KLThreshold,
    NoVerification,
    TrustVerifier,
)
from specstream.verification.quality import AdaptiveThreshold
from specstream.verification.rejection import BlockRejection, TokenRejection
from specstream.verification.tree import TreeRejection, accepted_path, ancestor_matrix, depths
from specstream.verification.typical import TypicalAcceptance

__all__ = [
    "AdaptiveThreshold",
    "BlockRejection",
    "CanvasVerifier",
    "ConfidenceThreshold",
    "DisagreementWithConfidence",
    "ExactMatch",
    "KLThreshold",
    "KeepOrRemask",
    "NoVerification",
    "TokenRejection",
    "TokenVerifier",
    "TreeRejection",
    "TrustVerifier",
    "TypicalAcceptance",
    "accepted_path",
    "ancestor_matrix",
    "depths",
]
