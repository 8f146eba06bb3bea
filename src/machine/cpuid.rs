//! What the guest's CPUID says.
