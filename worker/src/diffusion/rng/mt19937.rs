//! The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), seeded with `init_genrand` as torch and NumPy do.

const STATE_LEN: usize = 624;
const MIDDLE: usize = 397;

/// 32 random bits at a time.
#[derive(Debug, Clone)]
pub(super) struct Mt19937 {
    state: [u32; STATE_LEN],
    /// The next word of `state` to hand out; `STATE_LEN` when all are used.
    next: usize,
}

impl Mt19937 {
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [seed; STATE_LEN];
        for j in 1..STATE_LEN {
            let previous = state[j - 1];
            state[j] = 1_812_433_253_u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(j as u32);
        }
        Self { state, next: STATE_LEN }
    }

    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == STATE_LEN {
            self.renew();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn renew(&mut self) {
        for j in 0..STATE_LEN {
            let following = self.state[(j + 1) % STATE_LEN];
            let mixed = (self.state[j] & 0x8000_0000) | (following & 0x7fff_ffff);
            let matrix = if following & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[j] = self.state[(j + MIDDLE) % STATE_LEN] ^ (mixed >> 1) ^ matrix;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value that the C++ standard requires of `std::mt19937` ([rand.predef]).
    #[test]
    fn the_ten_thousandth_word_of_the_default_seed_is_the_standards() {
        let mut engine = Mt19937::new(5489);
        for _ in 1..10_000 {
            engine.next_u32();
        }
        assert_eq!(engine.next_u32(), 4_123_659_995);
    }
}
