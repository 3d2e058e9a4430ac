"""`paged-kv capacity`: how many sequences fit, from config.json alone.

Plain arithmetic, by the formulas that vLLM's processes use; policies and quantized pages bring
torch with them. No model is loaded here, and no vLLM.
"""
