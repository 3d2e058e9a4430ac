"""The reference engine: policies over plain, contiguous caches; the definition for the others."""
