"""Training two networks on handwritten digits in three arms; see ``benchmarks``."""
