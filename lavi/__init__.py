"""lavi: efficient vision-language models, and what they honestly cost."""

__version__ = "0.1.0"
