"""The data, see README.md. A package, because an installed one of this name would come before a mere folder."""
