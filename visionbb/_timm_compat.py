"""The few names that an outside package needs and timm does not export, in one place."""
from timm.models._features import FeatureGetterNet, feature_take_indices

__all__ = ["FeatureGetterNet", "feature_take_indices"]
