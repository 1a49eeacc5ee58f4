"""Looking at corpora: samples as a person would want to see them, and what a whole corpus comes to."""
