//! What of a machine belongs neither to a vCPU nor to a device: guest time inside the hypervisor, interrupt controllers,
//! memory and what is loaded into it.

use super::supervisor::StartError;
use crate::boot::EntryPoint;
use crate::host::bus::MemoryWatch;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Used by the machine actor, and by the thread that loads the guest anew; by one at a time.
pub trait Platform: Send + 'static {
    /// Guest time stands. The boot processor is paused, and all other vCPUs are, or are being waited for in vain. Returns the
    /// moment at which it stopped: the machine's own clock stops there too.
    fn freeze(&mut self) -> Instant;

    /// Guest time goes on, after it stood for so long; from the moment that is returned.
    fn thaw(&mut self, stood: Duration) -> Instant;

    /// Everything as after power-on, and the guest loaded; all vCPUs and devices are paused. Where the boot processor
    /// starts, if it is not where it did before.
    ///
    /// # Errors
    /// When the guest's files cannot be loaded any more, or the host refuses.
    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError>;

    /// Guest memory, as it is watched for SIGBUS.
    fn memory(&self) -> Option<Arc<MemoryWatch>> {
        None
    }
}

/// Of a machine whose guests are scripts.
pub struct NoPlatform;

impl Platform for NoPlatform {
    fn freeze(&mut self) -> Instant {
        Instant::now()
    }

    fn thaw(&mut self, _stood: Duration) -> Instant {
        Instant::now()
    }

    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError> {
        Ok(None)
    }
}
