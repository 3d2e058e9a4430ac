"""Operations on pages. The ground truth is torch: `packed_reference` for packed pages, `reference`
for attention over dense keys.
"""
