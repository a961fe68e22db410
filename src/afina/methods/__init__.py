"""The methods, one file each. A file registers its method; `afina.core.registry` finds it, and the contract tests run on
it because it is registered."""
