"""Operations on pages. `reference` (torch) is the ground truth for every other implementation."""
