//! What the command would otherwise load two shared libraries for, each time that it starts: a sixth of its start.

// The unwinder, of the compiler's archive. The shared libgcc_s.so.1 asks the processor some twenty times what it can do when
// it is loaded, and in a virtual machine each of these questions goes to the host.
#[cfg(static_unwinder)]
#[link(name = "gcc_eh", kind = "static")]
unsafe extern "C" {}

// The one function of libm.so.6 that is used, by the statistics of tokio's scheduler.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn pow(base: f64, exponent: f64) -> f64 {
    libm::pow(base, exponent)
}
