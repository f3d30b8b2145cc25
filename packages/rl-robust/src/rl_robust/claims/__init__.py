"""What the papers say, measured here: one module for each method, on its public interface only."""
