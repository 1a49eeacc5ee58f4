"""Few-shot evaluation: `flamingo evaluate` (paper, section 4 and appendix on evaluation)."""
