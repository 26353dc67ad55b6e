"""Run many adapters on one frozen base: plan a request, keep adapters resident, one forward for a mixed batch."""
