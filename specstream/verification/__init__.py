"""Rules of acceptance: pure functions of a draft, the target's laws and uniform numbers."""

from specstream.verification.base import TokenVerifier
from specstream.verification.rejection import BlockRejection, TokenRejection

__all__ = ["BlockRejection", "TokenRejection", "TokenVerifier"]
