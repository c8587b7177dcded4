"""What uses the model to measure something: never imported by it."""
import data  # noqa: F401  before torch: it tells OpenMP how to wait
